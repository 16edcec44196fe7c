"""The chat panel without a browser: streaming, stopping, editing, two engines side by side, probabilities."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from toy import ToyBackend, true_logits
from toy_engine import ToyEngine, ToyManifest, greedy, vocab_size, write_tokenizer

from llmlab.errors import EngineError, InputError
from llmlab.runtime.llm import LLM
from llmlab.runtime.params import SamplingParams
from llmlab.widgets.chat.model import Answer, Token, Turn, first_difference, label, percent
from llmlab.widgets.chat.panel import Chat, chat

LONG = SamplingParams(max_tokens=60, ignore_eos=True)


class Gated(ToyBackend):
    """Each step waits for a permit, so that a test knows how many tokens there are."""

    def __init__(self, **options):
        super().__init__(**options)
        self.permits = threading.Semaphore(0)

    def execute(self, batch):
        assert self.permits.acquire(timeout=20)
        return super().execute(batch)


class Other(ToyBackend):
    """Says the same for some tokens, then something else."""

    def execute(self, batch):
        logits = super().execute(batch)
        longest = batch.kv_len[np.searchsorted(batch.query_start, batch.logits_index, side="right") - 1]
        return np.where((longest >= 40)[:, None], -logits, logits)


def engine(folder: Path, kind=ToyBackend, name="toy", **options) -> ToyEngine:
    write_tokenizer(folder / name)
    return ToyEngine(folder / name, ToyManifest(max_seq_len=256), options, kind)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def talk(tmp_path):
    with_engines = []

    def make(*engines, **options) -> Chat:
        panel = chat(*engines, **{"params": LONG, **options})
        with_engines.append(panel)
        return panel

    yield lambda *kinds, **options: make(
        *(engine(tmp_path, kind, name=f"toy{i}") for i, kind in enumerate(kinds or [ToyBackend])), **options
    )
    for panel in with_engines:
        panel.close()


def test_an_answer_is_what_the_engine_says(talk):
    panel = talk(params=SamplingParams(max_tokens=12))
    turn = panel.ask("count")
    [answer] = turn.answers
    llm = panel.speakers[0].llm
    result = llm.chat([{"role": "user", "content": "count"}], SamplingParams(max_tokens=12))
    assert answer.text == result.text and answer.token_ids == result.token_ids
    assert answer.finish_reason == result.finish_reason and not answer.error
    assert panel.messages == [{"role": "user", "content": "count"}, {"role": "assistant", "content": result.text}]
    assert answer.metrics.output_tokens == len(answer.tokens) and "tokens/s" in panel.html()


def test_the_next_prompt_holds_the_conversation_and_the_system_prompt(talk):
    panel = talk(params=SamplingParams(max_tokens=5), system="be brief")
    first = panel.ask("one").answers[0]
    second = panel.ask("two").answers[0]
    text = f"<system>be brief<user>one<assistant>{first.text}<user>two<assistant>"
    prompt = panel.speakers[0].tokenizer.encode(text, add_special_tokens=False)
    assert second.token_ids == greedy(prompt, 5)


def test_probabilities_are_the_models(talk):
    panel = talk(params=SamplingParams(max_tokens=6, ignore_eos=True))
    [answer] = panel.ask("that").answers
    tokenizer = panel.speakers[0].tokenizer
    tokens = tokenizer.encode("<user>that<assistant>", add_special_tokens=False)
    for token in answer.tokens:
        logits = true_logits(tokens, vocab_size()).astype(np.float64)
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-shares, kind="stable")[:5]
        assert math.isclose(token.probability, shares[token.id], rel_tol=1e-4)
        assert [c.label for c in token.top] == [label(int(i), tokenizer) for i in best]
        tokens.append(token.id)
    assert "title=" in panel.html() and f"token 6: {answer.tokens[5].label}" in panel.html().replace("&#34;", '"')


def test_stop_ends_within_one_token(talk):
    panel = talk(Gated)
    backend = panel.speakers[0].llm.core.backend
    panel.send("count")
    backend.permits.release(7)
    until(lambda: len(panel.turns[-1].answers[0].tokens) == 7)
    assert panel.busy and "disabled" in panel.draw_compose()
    panel.act("stop")
    backend.permits.release(5)
    assert panel.wait(20)
    [answer] = panel.turns[-1].answers
    assert 7 <= len(answer.tokens) <= 8 and answer.finish_reason == "cancelled"
    assert answer.metrics.output_tokens == len(answer.tokens)
    assert "stopped" in panel.html()
    panel.speakers[0].llm.core.check_integrity()
    backend.permits.release(200)
    assert len(panel.ask("and again").answers[0].tokens) == 60, "the chat goes on"


def test_while_an_answer_grows_nothing_else_is_asked(talk):
    panel = talk(Gated)
    panel.send("count")
    for act, key, value in (
        ("send", "", {"text": "more"}),
        ("edit", "0", {"text": "x"}),
        ("regenerate", "0", None),
        ("clear", "", None),
    ):
        assert "stop it first" in panel.act(act, key, value)["problem"]
    panel.stop()
    panel.speakers[0].llm.core.backend.permits.release(3)
    assert panel.wait(20)
    panel.act("clear")
    assert panel.messages == [] and not panel.turns


def test_edit_and_regenerate_forget_what_follows(talk):
    panel = talk(params=SamplingParams(max_tokens=6))
    for text in ("one", "two", "three"):
        panel.ask(text)
    before = panel.messages
    panel.act("open", "1")
    assert 'data-act="edit"' in panel.html() and ">two</textarea>" in panel.html()
    panel.act("edit", "1", {"text": "zwei"})
    assert panel.wait(20)
    assert panel.messages[:2] == before[:2] and [t.user for t in panel.turns] == ["one", "zwei"]
    prompt = panel.speakers[0].tokenizer.encode_chat(panel.messages[:3])[1]
    assert panel.turns[1].answers[0].token_ids == greedy(prompt, 6)
    panel.act("regenerate", "0")
    assert panel.wait(20)
    assert panel.messages == before[:2], "greedy answers come again, what followed is gone"
    assert "no turn 5" in panel.act("regenerate", "5")["problem"]


def test_the_seed_decides(talk):
    panel = talk(params=SamplingParams(max_tokens=20, temperature=2.0, seed=3, ignore_eos=True))
    first = panel.ask("count").answers[0].token_ids
    panel.regenerate()
    panel.wait(20)
    assert panel.turns[0].answers[0].token_ids == first
    panel.act("set", "seed", "4")
    panel.regenerate()
    panel.wait(20)
    assert panel.turns[0].answers[0].token_ids != first
    panel.act("set", "seed", "")
    assert panel.params.seed is None


def test_controls_are_checked(talk):
    panel = talk()
    panel.act("set", "top_k", 5)
    panel.act("set", "temperature", 0.5)
    assert (panel.params.top_k, panel.params.temperature) == (5, 0.5)
    for key, value in (("temperature", -1), ("max_tokens", 0), ("seed", "x"), ("top_p", 2)):
        assert "expected" in panel.act("set", key, value)["problem"]
    panel.act("set", "n", 3)
    assert panel.params.n == 1 and panel.params.temperature == 0.5
    assert "empty" in panel.act("send", "", {"text": "  "})["problem"]


def test_two_engines_and_where_they_part(talk):
    panel = talk(ToyBackend, Other)
    turn = panel.ask("count to nine")
    a, b = (answer.token_ids for answer in turn.answers)
    apart = int(np.flatnonzero(np.array(a) != np.array(b))[0])
    assert 0 < apart < 59 and turn.first_difference == apart
    assert f"differs from token {apart + 1} on" in panel.html() and panel.html().count("differs") >= 2
    assert f"Token {apart + 1}: what could have come" in panel.html(), "the picture shows that place"
    prompt = panel.speakers[0].tokenizer.encode_chat([{"role": "user", "content": "count to nine"}])[1]
    assert a == greedy(prompt, 60, eos=None)
    assert panel.to_dict()["turns"][0]["first_difference"] == apart
    panel.act("keep", "0.1")
    assert panel.messages[1]["content"] == turn.answers[1].text
    panel.act("token", "0.3")
    assert "Token 4: what could have come" in panel.html()


@pytest.mark.parametrize("together", [True, False])
def test_both_run_at_the_same_time_unless_it_is_unticked(talk, together):
    panel = talk(Gated, Gated)
    panel.act("together", "", together)
    first, second = (speaker.llm.core.backend for speaker in panel.speakers)
    panel.send("count")
    second.permits.release(5)
    a, b = panel.turns[-1].answers
    if together:
        until(lambda: len(b.tokens) == 5)
    else:
        time.sleep(0.05)
        assert not b.tokens
    assert not a.tokens
    first.permits.release(100)
    second.permits.release(100)
    assert panel.wait(20) and len(a.tokens) == len(b.tokens) == 60


def test_stop_ends_both_also_the_one_that_waits(talk):
    panel = talk(Gated, Gated)
    panel.act("together", "", False)
    panel.send("count")
    panel.act("stop")
    for speaker in panel.speakers:
        speaker.llm.core.backend.permits.release(2)
    assert panel.wait(20)
    assert [len(a.tokens) for a in panel.turns[-1].answers][1] == 0
    assert all(a.finish_reason == "cancelled" for a in panel.turns[-1].answers)


def test_an_engine_that_fails_is_one_line(talk):
    class Broken(ToyBackend):
        def __init__(self, **options):
            super().__init__(**options, fail_at=(4,))

    panel = talk(Broken, ToyBackend)
    turn = panel.ask("count")
    assert "the toy broke" in turn.answers[0].error and not turn.answers[1].error
    assert len(turn.answers[1].tokens) == 60 and panel.html().count('role="alert"') == 1
    too_long = panel.ask("count " * 400)
    assert all("expected at most" in answer.error for answer in too_long.answers)


def test_closing_while_an_answer_grows(tmp_path):
    made = engine(tmp_path, Gated)
    panel = chat(made, params=LONG)
    panel.send("count")
    made.made.permits.release(100)
    panel.close()
    panel.close()
    assert not panel.busy
    with pytest.raises(EngineError, match="closed"):
        panel.speakers[0].llm.generate([1, 2], LONG)
    with pytest.raises(InputError, match="closed"):
        panel.send("more")


def test_an_llm_stays_its_owners(tmp_path):
    with LLM(engine(tmp_path)) as llm:
        panel = chat(llm, llm, names=["left", "right"], params=LONG)
        assert panel.ask("count").first_difference is None
        assert "alike in all 60 tokens" in panel.html() and "left" in panel.title()
        panel.close()
        assert llm.generate([1, 2], LONG).token_ids


def test_what_cannot_chat_is_refused(tmp_path):
    made = engine(tmp_path)
    (made.path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        chat(made)
    with pytest.raises(EngineError, match="no such folder"):
        chat(tmp_path / "none")
    with pytest.raises(InputError, match="one for each of the 1 engines"):
        chat(made, names=["a", "b"])


def test_half_characters_are_never_shown(tmp_path):
    """An engine that is made to say bytes of “é” one by one."""
    write_tokenizer(tmp_path / "toy")
    first, second = "é".encode()

    class Says(ToyBackend):
        def execute(self, batch):
            logits = super().execute(batch)
            logits[:] = -5.0
            logits[:, ids[first] if self.steps % 2 else ids[second]] = 5.0
            return logits

    with LLM(ToyEngine(tmp_path / "toy", kind=Says)) as llm:
        tokenizer = llm.tokenizer
        ids = {tokenizer.token_bytes(i)[0]: i for i in range(1, vocab_size()) if len(tokenizer.token_bytes(i)) == 1}
        panel = chat(llm, params=SamplingParams(max_tokens=4, ignore_eos=True))
        [answer] = panel.ask("x").answers
        assert answer.text == "éé" and [t.text for t in answer.tokens] == ["", "é", "", "é"]
        assert answer.tokens[0].label == "bytes C3" and "\ufffd" not in panel.html()
        assert panel.html().count('class="tok') == 2


def test_the_picture_has_no_controls_and_escapes(talk):
    panel = talk(params=SamplingParams(max_tokens=5))
    panel.ask("<img src=x onerror=alert(1)>")
    html = panel.static()
    assert "<img" not in html and "<script" not in html and "temperature 0" in html
    assert str(panel).startswith("Chat with") and "You: <img" in str(panel)
    assert panel.to_dict()["turns"][0]["answers"][0]["metrics"]["output_tokens"] == 5


def test_first_difference_and_what_is_said_of_it():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None and first_difference([1, 2], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    turn = Turn("x", [Answer(n, [Token(1, "a", "“a”")] * c, going=False) for n, c in (("A", 2), ("B", 3))])
    assert turn.comparison() == "alike in the 2 tokens that both have"
    assert [percent(p) for p in (1.0, 0.99999, 0.5, 1e-9)] == ["100.0 %", "> 99.9 %", "50.0 %", "< 0.1 %"]


@pytest.mark.slow
def test_tinychat_stops_and_streams(store):
    panel = chat(store.engine("tinychat"), params=SamplingParams(max_tokens=64, ignore_eos=True))
    seen: list[int] = []
    panel.listen(lambda drawn: seen.append(len(panel.turns[-1].answers[0].tokens)) if "last" in drawn else None)
    panel.send("How do I count to nine in French?")
    until(lambda: len(panel.turns[-1].answers[0].tokens) >= 3)
    panel.stop()
    at_stop = len(panel.turns[-1].answers[0].tokens)
    assert panel.wait(20)
    assert at_stop <= len(panel.turns[-1].answers[0].tokens) <= at_stop + 1
    assert seen == sorted(seen) and len(seen) >= 2
    panel.close()
