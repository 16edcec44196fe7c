"""What evaluation data may be, and what is said of data that can't be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmlab import zoo
from llmlab.errors import InputError
from llmlab.evaluate.samples import samples
from llmlab.text.tokenizer import Tokenizer
from llmlab.zoo.tasks import examples

TOKENIZER = Tokenizer(zoo.path())
EOS = 1


def test_the_zoo_is_the_default_and_only_answers_count() -> None:
    found = samples("tinychat", TOKENIZER, count=22, length=256, eos=EOS)
    chats = examples("held-out", 22)
    assert 20 <= len(found) <= 22 and {s.task for s in found} == {e.task for e in chats}
    first = chats[0]
    assert found[0].ids[: found[0].first].tolist() == TOKENIZER.encode_chat(first.messages)[1]
    assert TOKENIZER.decode(found[0].ids[found[0].first :].tolist()) == first.answer == found[0].answer
    assert found[0].ids[-1] == EOS and found[0].bytes == len(first.answer.encode())


def test_every_form_of_a_pair_is_the_same_sample() -> None:
    pair = ("What is 2 plus 3?", "5")
    messages = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    forms = [pair, dict(zip(("prompt", "answer"), pair, strict=True)), messages, {"messages": messages}]
    found = samples(forms, TOKENIZER, count=9, length=64, eos=EOS)
    assert len(found) == 4 and all((s.ids == found[0].ids).all() and s.first == found[0].first for s in found)
    (open_end,) = samples([messages[:1]], TOKENIZER, count=9, length=64, eos=EOS)
    assert open_end.answer is None and open_end.first == 1


def test_texts_are_cut_and_their_bytes_counted() -> None:
    text = "Zürich liegt am See. " * 30
    found = samples([text], TOKENIZER, count=99, length=16)
    ids = TOKENIZER.encode(text)
    assert np.concatenate([s.ids for s in found]).tolist() == ids[: sum(len(s.ids) for s in found)]
    assert max(len(s.ids) for s in found) == 16 and all(s.first == 1 and s.answer is None for s in found)
    firsts = sum(len(TOKENIZER.token_bytes(int(s.ids[0]))) for s in found)
    assert sum(s.bytes or 0 for s in found) + firsts == len(text.encode())
    assert len(samples([text], TOKENIZER, count=2, length=16)) == 2


def test_files_and_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    lines = [{"text": "one two three"}, {"prompt": "p", "answer": "a", "task": "mine"}, "one two three", [4, 5, 6]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    text = samples(tmp_path / "a.txt", TOKENIZER, count=9, length=64)
    mixed = samples(str(tmp_path / "a.jsonl"), TOKENIZER, count=9, length=64)
    assert mixed[0].ids.tolist() == text[0].ids.tolist() == mixed[2].ids.tolist()
    assert mixed[1].task == "mine" and mixed[3].ids.tolist() == [4, 5, 6]
    bare = samples([[4, 5, 6], np.array([7, 8])], None, count=9, length=64)
    assert [s.bytes for s in bare] == [None, None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds nothing to measure: expected at least one text"),
        (["x"], "holds nothing to measure"),
        ([("a", "b " * 90)], "all 1 are longer than 64 tokens"),
        (
            "nowhere.jsonl",
            "data is 'nowhere.jsonl', expected 'tinychat', a .jsonl or .txt file, or a list: one text is",
        ),
        ({"text": "a"}, "data is a dict"),
        ([3], "item 0: a int, expected a text, a"),
        ([("a", "")], "item 0: an empty answer"),
        ([[1, "b"]], "item 0: token ids are integers"),
        ([[{"role": "user"}]], "message 0"),
    ],
)
def test_data_that_cannot_be_used(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        samples(data, TOKENIZER, count=9, length=64)


def test_more_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"fine text here"\n{"text": \n')
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        samples(tmp_path / "a.jsonl", TOKENIZER, count=9, length=64)
    with pytest.raises(InputError, match="has no tokenizer: give lists of token ids"):
        samples(["text"], None, count=9, length=64)
    with pytest.raises(InputError, match="samples is 0, expected an integer of at least 1"):
        samples("tinychat", TOKENIZER, count=0, length=64)
    with pytest.raises(InputError, match=r"length is 1\.5"):
        samples("tinychat", TOKENIZER, count=1, length=1.5)  # type: ignore[arg-type]
