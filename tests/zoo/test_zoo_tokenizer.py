"""tinychat's tokenizer: every text comes back, chats encode as the template says, digits stand alone."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer

from llmlab import zoo
from llmlab.zoo.batches import IGNORE, WEIGHTS, training_batch
from llmlab.zoo.tasks import TASKS, examples
from llmlab.zoo.tokenizer import CHAT_TEMPLATE, SPECIAL, VOCAB_SIZE, encode_chats, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(zoo.path() / "tokenizer.json"))


def test_every_text_comes_back(tokenizer: Tokenizer) -> None:
    texts = [text for e in examples("held-out", 330) for text in (*(m["content"] for m in e.messages), e.answer)]
    texts += ["naïve Ωμέγα 漢字 🙂\n\ttabs", "x" * 300, "", "  two  blanks  "]
    assert [tokenizer.decode(item.ids) for item in tokenizer.encode_batch(texts)] == texts


def test_special_tokens_have_the_first_ids_and_the_vocabulary_is_full(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == 2048


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert [token for token in tokenizer.encode("4821 and 17").tokens if token.isdigit()] == list("482117")


def test_no_prompt_with_its_answer_passes_the_context(tokenizer: Tokenizer) -> None:
    found = examples("held-out", 200, task="recall") + examples("train", 600, task="recall")
    lengths = [len(ids) for ids, _ in encode_chats(tokenizer, [e.messages for e in found], [False] * len(found))]
    assert max(lengths) <= 1000
    assert sum(length > 400 for length in lengths) > 200


def test_chats_encode_as_the_chat_template_says(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(zoo.path())
    assert auto.chat_template == CHAT_TEMPLATE
    chats = [[*e.messages, {"role": "assistant", "content": e.answer}] for e in examples("held-out", 66)]
    for chat, (ids, learned) in zip(chats, encode_chats(tokenizer, chats, [False] * len(chats)), strict=True):
        assert auto(auto.apply_chat_template(chat, tokenize=False))["input_ids"] == ids
        prompt = auto.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        length = len(auto(prompt)["input_ids"])
        assert auto(prompt)["input_ids"] == ids[:length] and all(learned[length:]) and not learned[length - 1]
    with pytest.raises(Exception, match="unknown role tool"):
        auto.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_a_tokenizer_is_deterministic() -> None:
    texts = [e.prompt for e in examples("train", 300)]
    assert train_tokenizer(texts, 400).to_str() == train_tokenizer(texts, 400).to_str()


def test_a_step_has_fixed_shapes_and_learns_answers_only(tokenizer: Tokenizer) -> None:
    assert list(WEIGHTS) == list(TASKS)
    first, again, second = (training_batch(tokenizer, step, 64, 1024) for step in (0, 0, 1))
    for one, same, other in zip(first, again, second, strict=True):
        assert (one.ids == same.ids).all() and (one.targets == same.targets).all()
        assert one.ids.shape == other.ids.shape and one.learned.shape == other.learned.shape
    short = first[0]
    assert not (short.ids == second[0].ids).all()
    for row in range(len(short.ids)):
        length = short.ids.shape[1]
        here = (short.learned // length == row) & (short.targets != IGNORE)
        target = tokenizer.decode(short.targets[here].tolist(), skip_special_tokens=False)
        whole = tokenizer.decode(short.ids[row].tolist(), skip_special_tokens=False).replace("<|pad|>", "")
        answers = re.findall(r"<\|assistant\|>(.*?<\|end\|>)", whole, re.DOTALL)
        # in a bare chat the model also has to say the mark that opens its answer
        assert answers and target.removeprefix("<|assistant|>") == "".join(answers)
        assert (short.ids.reshape(-1)[short.learned[here] + 1] == short.targets[here]).all()
