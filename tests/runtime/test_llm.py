"""LLM over the toy backend: what it says against the oracle, and what is left behind when something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_engine import ToyEngine, ToyLimits, ToyManifest, greedy, vocab_size, write_tokenizer

from llmlab.errors import EngineError, InputError
from llmlab.runtime.llm import LLM
from llmlab.runtime.params import SamplingParams
from llmlab.text.tokenizer import Tokenizer

PROMPTS = ["the cat sat", "count to nine", "that was that and", "x"]


@pytest.fixture
def engine(tmp_path: Path) -> ToyEngine:
    write_tokenizer(tmp_path / "engine")
    return ToyEngine(tmp_path / "engine")


@pytest.fixture
def llm(engine: ToyEngine) -> LLM:
    return LLM(engine, max_num_seqs=8)


def params(count: int = 12, **values) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **values)


def ids_of(engine: ToyEngine, text: str) -> list[int]:
    return Tokenizer(engine.path).encode(text)


def expected(engine: ToyEngine, text: str, count: int = 12) -> list[int]:
    return greedy(ids_of(engine, text), count, eos=None)


def assert_idle(llm: LLM) -> None:
    """Nothing is queued or running, and no block is lost."""
    if llm.core.has_work:  # cancellations that nobody was told of yet
        assert all(update.finish_reason == "cancelled" for update in llm.core.step())
    assert not llm.core.has_work
    llm.core.check_integrity()


def on_step(engine: ToyEngine, step: int, action: Callable[[], None]) -> None:
    """Run `action` inside the backend's step number `step`."""
    backend = engine.made
    assert backend is not None
    execute = backend.execute

    def wrapped(batch):
        logits = execute(batch)
        if backend.steps == step:
            action()
        return logits

    backend.execute = wrapped  # type: ignore[method-assign]


# Generating


def test_a_single_prompt_gives_a_single_result(llm: LLM, engine: ToyEngine) -> None:
    result = llm.generate("the cat sat", params())
    assert result.token_ids == expected(engine, "the cat sat")
    assert result.text == Tokenizer(engine.path).decode(result.token_ids)
    assert (result.prompt, result.prompt_token_ids) == ("the cat sat", ids_of(engine, "the cat sat"))
    assert result.finish_reason == "length" and result.logprobs is None
    assert_idle(llm)


def test_a_list_gives_a_list_in_the_same_order(llm: LLM, engine: ToyEngine) -> None:
    ids = ids_of(engine, PROMPTS[1])
    prompts = [PROMPTS[0], ids, np.array(ids_of(engine, PROMPTS[2])), tuple(ids)]
    results = llm.generate(prompts, [params(3), params(20), params(12), params(1)])
    texts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    assert [r.token_ids for r in results] == [
        expected(engine, text, count) for text, count in zip(texts, [3, 20, 12, 1], strict=True)
    ]
    assert [r.prompt for r in results] == [PROMPTS[0], None, None, None]
    assert llm.generate([]) == []
    assert len(llm.generate([[1, 2]], params(2))) == 1
    assert llm.generate([1, 2], params(2)).token_ids == llm.generate(np.array([1, 2]), params(2)).token_ids


def test_end_of_sequence_is_in_the_ids_but_not_in_the_text(engine: ToyEngine) -> None:
    ids = expected(engine, "x", 8)
    plain = next(i for i in ids[3:] if i not in ids[:3])
    engine.manifest = ToyManifest(eos_token_ids=(plain,))
    llm = LLM(engine, max_num_seqs=4)
    result = llm.generate("x", SamplingParams(max_tokens=20))
    end = ids.index(plain)
    assert result.token_ids == ids[: end + 1] and result.finish_reason == "stop"
    assert result.text == Tokenizer(engine.path).decode(ids[:end])
    assert llm.generate("x", params(8)).token_ids == ids, "ignore_eos goes on"
    stopped = llm.generate("x", params(8, stop_token_ids=[ids[2]]))
    assert stopped.finish_reason == "stop" and stopped.text == Tokenizer(engine.path).decode(ids[:2])


def test_stop_strings_cut_the_text_and_end_the_request(llm: LLM, engine: ToyEngine) -> None:
    whole = llm.generate("the cat sat", params(40))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]  # over token borders
    shown, deltas = "", list(llm.stream("the cat sat", params(40, stop=["never so", stop])))
    for delta in deltas:
        shown += delta.text
        assert whole.text[: whole.text.index(stop)].startswith(shown)
    assert shown == whole.text[: whole.text.index(stop)]
    assert [d.finish_reason for d in deltas][:-1] == [None] * (len(deltas) - 1) and deltas[-1].finish_reason == "stop"
    assert sum(len(d.token_ids) for d in deltas) < 40, "the engine went on after the stop string"
    assert_idle(llm)


def test_n_completions_have_their_own_texts(llm: LLM) -> None:
    result = llm.generate("the cat", params(8, n=3, temperature=1.0, seed=7))
    again = llm.generate("the cat", params(8, n=3, temperature=1.0, seed=7))
    assert [c.index for c in result.completions] == [0, 1, 2]
    assert len({c.text for c in result.completions}) == 3
    assert [c.token_ids for c in again.completions] == [c.token_ids for c in result.completions]
    assert result.metrics.output_tokens == 24 and result.text == result.completions[0].text


def test_the_generation_config_gives_the_defaults(engine: ToyEngine) -> None:
    engine.manifest = ToyManifest(generation={"do_sample": True, "temperature": 2.0, "top_k": 0})
    llm = LLM(engine, max_num_seqs=4)
    sampled = llm.generate("the cat", params(8, seed=1)).token_ids
    assert sampled == llm.generate("the cat", params(8, seed=1, temperature=2.0)).token_ids
    assert sampled != expected(engine, "the cat", 8) == llm.generate("the cat", params(8, temperature=0)).token_ids


def test_logprobs_come_one_a_token(llm: LLM) -> None:
    result = llm.generate("the cat", params(6, logprobs=2))
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in result.logprobs)


def test_chat_goes_through_the_template(llm: LLM, engine: ToyEngine) -> None:
    messages = [{"role": "user", "content": "count"}]
    result = llm.chat(messages, params(4), template_variables={"suffix": "!"})
    assert result.prompt == "<user>count<assistant>!"
    assert result.token_ids == expected(engine, "<user>count<assistant>!", 4)
    several = llm.chat([messages, [*messages, {"role": "user", "content": "to"}]], params(4))
    assert [r.prompt for r in several] == ["<user>count<assistant>", "<user>count<user>to<assistant>"]
    assert "".join(d.text for d in llm.stream(messages, params(4))) == llm.chat(messages, params(4)).text
    with pytest.raises(InputError, match="chat takes messages"):
        llm.chat("count")
    with pytest.raises(InputError, match="prompt 1: message 0"):
        llm.chat([messages, [{"content": "x"}]])


def test_metrics_tell_waiting_from_working(engine: ToyEngine) -> None:
    llm = LLM(engine, max_num_seqs=1)
    first, second = llm.generate(["the cat", "count to"], params(6))
    for metrics in (first.metrics, second.metrics):
        assert 0 <= metrics.queue_s < metrics.ttft_s < metrics.e2e_s
        assert len(metrics.itl_s) == 5
        assert metrics.ttft_s + sum(metrics.itl_s) == pytest.approx(metrics.e2e_s)
        assert metrics.tokens_per_s == pytest.approx(6 / metrics.e2e_s)
    assert second.metrics.queue_s > first.metrics.ttft_s, "one place: the second waits until the first has ended"
    assert second.metrics.prompt_tokens == len(second.prompt_token_ids)


# Bad input


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        (["the cat", ""], "prompt 1: the prompt is empty"),
        (["the cat", [1, "2"]], "prompt 1: .*'2'"),
        (["the cat", [1, True]], "prompt 1: .*True"),
        (["the cat", [1, 10**6]], "prompt 1: .*1000000"),
        (["the cat", [1, -1]], "prompt 1: .*-1"),
        (["the cat", [1] * 96], "prompt 1: .*96"),
        (["the cat", 3.5], "prompt 1: .*float"),
        (["the cat", b"x"], "prompt 1: .*bytes"),
        ("", "the prompt is empty"),
        (7, "prompts are a int"),
        (b"x", "prompts are a bytes"),
        ({"prompt": "x"}, "prompts are a dict"),
    ],
)
def test_a_bad_prompt_is_named_and_nothing_is_queued(llm: LLM, engine: ToyEngine, prompts, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        llm.generate(prompts)
    assert "\n" not in str(caught.value)
    assert not llm.core.has_work and engine.made.steps == 0
    if isinstance(prompts, list):
        with pytest.raises(InputError):
            llm.stream(prompts[1])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [([SamplingParams()], "1 entries for 2 prompts"), ("greedy", "'greedy'"), ([SamplingParams(), None], "expected")],
)
def test_bad_params(llm: LLM, bad, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        llm.generate(["a", "b"], bad)
    assert not llm.core.has_work


def test_an_engine_without_a_tokenizer_takes_ids(engine: ToyEngine, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    bare = ToyEngine(tmp_path / "bare")
    llm = LLM(bare, max_num_seqs=4)
    assert llm.tokenizer is None
    with pytest.raises(InputError, match="no tokenizer: give the prompt as a list of token ids"):
        llm.generate("the cat")
    with pytest.raises(InputError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="stop_token_ids"):
        llm.generate([1, 2], SamplingParams(stop="x"))
    result = llm.generate([1, 2, 3], params(5))
    assert result.token_ids == greedy([1, 2, 3], 5, eos=None) and result.text == "" and result.prompt is None


@pytest.mark.parametrize("bad", [0, -1, 1.5, "8", True])
def test_max_num_seqs_is_checked(engine: ToyEngine, bad) -> None:
    with pytest.raises(InputError, match="max_num_seqs"):
        LLM(engine, max_num_seqs=bad)


def test_by_default_a_step_holds_every_sequence(engine: ToyEngine) -> None:
    engine.manifest = ToyManifest(limits=ToyLimits(max_tokens_per_step=3))
    assert [len(r.token_ids) for r in LLM(engine).generate(PROMPTS, params(4))] == [4] * 4
    with pytest.raises(InputError, match="max_tokens_per_step"):
        LLM(engine, max_num_seqs=4)


def test_threads_reach_the_backend(engine: ToyEngine) -> None:
    LLM(engine, threads=3, max_num_seqs=4)
    assert engine.threads == 3


# Streaming, breaking off, failing


def test_a_stream_joins_to_what_generate_says(llm: LLM) -> None:
    stream = llm.stream("the cat sat", params(20, n=2, temperature=1.0, seed=3))
    deltas = list(stream)
    result = llm.generate("the cat sat", params(20, n=2, temperature=1.0, seed=3))
    for completion in result.completions:
        mine = [d for d in deltas if d.index == completion.index]
        assert "".join(d.text for d in mine) == completion.text
        assert [i for d in mine for i in d.token_ids] == completion.token_ids
        assert [d.finish_reason for d in mine if d.finish_reason] == ["length"]
    assert [c.text for c in stream.result.completions] == [c.text for c in result.completions]
    assert stream.result.metrics.output_tokens == 40


def test_an_abandoned_stream_is_cancelled(llm: LLM, engine: ToyEngine) -> None:
    for abandon in ("close", "drop", "never started"):
        stream = llm.stream("the cat sat", params(40))
        if abandon != "never started":
            next(stream), next(stream)
        if abandon == "close":
            assert stream.result.finish_reason is None
            stream.close()
            assert stream.result.finish_reason == "cancelled"
        del stream
        assert_idle(llm)
    assert llm.generate("the cat sat", params()).token_ids == expected(engine, "the cat sat")


def test_generate_inside_an_open_stream(llm: LLM, engine: ToyEngine) -> None:
    stream = llm.stream("the cat sat", params(20))
    ids = next(stream).token_ids
    assert llm.generate("count to nine", params()).token_ids == expected(engine, "count to nine")
    for delta in stream:
        ids = ids + delta.token_ids
    assert ids == expected(engine, "the cat sat", 20)
    assert_idle(llm)


def test_closing_a_stream_in_the_middle_of_a_step_does_not_wait(llm: LLM, engine: ToyEngine) -> None:
    """The garbage collector may do that."""
    stream = llm.stream("the cat sat", params(40))
    next(stream)
    on_step(engine, engine.made.steps + 2, stream.close)
    assert llm.generate("count to nine", params()).token_ids == expected(engine, "count to nine")
    assert stream.result.finish_reason == "cancelled" and len(stream.result.token_ids) < 12
    assert_idle(llm)


def test_ctrl_c_cancels_and_leaves_the_llm_usable(llm: LLM, engine: ToyEngine) -> None:
    other = llm.stream("x", params(30))
    begun = next(other).token_ids
    handler = signal.getsignal(signal.SIGINT)
    finished = []
    on_step(engine, 4, lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05), finished.append(True)))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, params(40))
    assert finished == [True], "the step was torn apart"
    assert engine.made.steps == 4 and signal.getsignal(signal.SIGINT) is handler
    llm.core.check_integrity()
    rest = [i for delta in other for i in delta.token_ids]
    assert begun + rest == expected(engine, "x", 30), "only the interrupted call's requests are cancelled"
    assert_idle(llm)
    assert [r.token_ids for r in llm.generate(PROMPTS, params())] == [expected(engine, p) for p in PROMPTS]


def test_a_failing_backend_is_an_engine_error_and_the_llm_goes_on(engine: ToyEngine) -> None:
    engine.options = {"fail_at": [3]}
    llm = LLM(engine, max_num_seqs=8)
    with pytest.raises(EngineError, match="the toy") as caught:
        llm.generate(PROMPTS, params())
    assert "\n" not in str(caught.value)
    assert_idle(llm)
    assert llm.generate("x", params()).token_ids == expected(engine, "x")


def test_a_closed_llm_says_so(llm: LLM) -> None:
    with llm:
        stream = llm.stream("x", params(20))
        next(stream)
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    llm.close()


# Threads


def test_threads_share_batches(engine: ToyEngine) -> None:
    llm = LLM(engine, max_num_seqs=16)
    results: dict[str, list[int]] = {}
    barrier = threading.Barrier(len(PROMPTS))

    def work(prompt: str) -> None:
        barrier.wait()
        results[prompt] = llm.generate(prompt, params(30)).token_ids

    workers = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert results == {prompt: expected(engine, prompt, 30) for prompt in PROMPTS}
    assert engine.made.steps < 3 * 30, "four requests of 30 steps each, run one after another, take 120"
    assert_idle(llm)


def test_a_newcomer_is_not_starved_by_a_busy_thread(engine: ToyEngine) -> None:
    engine.manifest = ToyManifest(max_seq_len=512)
    llm = LLM(engine, max_num_seqs=4)

    def work() -> None:
        with pytest.raises(EngineError, match="closed"):
            llm.generate("the cat", params(300))

    busy = threading.Thread(target=work)
    busy.start()
    while engine.made.steps < 3:
        time.sleep(0.001)
    llm.generate("x", params(5))
    assert busy.is_alive(), "a request of 5 tokens waited for one of 300"
    assert engine.made.steps < 100
    llm.close()
    busy.join(timeout=30)
    assert not busy.is_alive()


def test_close_wakes_the_threads_that_wait(engine: ToyEngine) -> None:
    engine.manifest = ToyManifest(max_seq_len=512)
    llm = LLM(engine, max_num_seqs=4)
    errors = []

    def work() -> None:
        try:
            llm.generate(PROMPTS, params(300))
        except EngineError as error:
            errors.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    while engine.made.steps < 3:
        time.sleep(0.001)
    llm.close()
    for worker in workers:
        worker.join(timeout=30)
    assert len(errors) == 3 and all("closed" in error for error in errors)


# The progress bar


class Terminal:
    def __init__(self, tty: bool) -> None:
        self.tty, self.text = tty, ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize(
    ("tty", "progress", "prompts", "shown"),
    [
        (True, True, PROMPTS, True),
        (True, False, PROMPTS, False),
        (False, True, PROMPTS, False),
        (True, True, "x", False),
    ],
)
def test_progress_is_shown_for_batches_on_a_terminal(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, tty: bool, progress: bool, prompts, shown: bool
) -> None:
    terminal = Terminal(tty)
    monkeypatch.setattr(sys, "stderr", terminal)
    llm.generate(prompts, params(4), progress=progress)
    assert ("answer" in terminal.text) == shown


def test_a_notebook_shows_the_bar_and_keeps_no_trace_of_it(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    write_tokenizer(tmp_path / "engine")
    code = f"""
import asyncio, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import llmlab as ll
from pathlib import Path
from toy_engine import ToyEngine
engine, params = ToyEngine(Path({str(tmp_path / "engine")!r})), ll.SamplingParams(max_tokens=3)
results = ll.LLM(engine, max_num_seqs=4).generate(["a", "b", "c"], params)
async with ll.AsyncLLM(engine, max_num_seqs=4) as llm:
    same = await llm.generate(["a", "b", "c"], params)
assert [r.token_ids for r in same] == [r.token_ids for r in results]
results[0]
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    messages: list[dict] = []
    client = nbclient.NotebookClient(notebook, kernel_name="python3", on_cell_executed=None, store_widget_state=False)
    process = client.process_message

    def keep(message, *arguments, **options):
        messages.append(message)
        return process(message, *arguments, **options)

    client.process_message = keep
    client.execute()
    assert any("0/3" in str(m["content"].get("data", "")) for m in messages if m["msg_type"] == "display_data")
    outputs = notebook.cells[0].outputs
    assert [o.data["text/plain"] for o in outputs if o.output_type == "display_data"] == [""]
    assert [o.output_type for o in outputs] == ["display_data", "execute_result"], "no warnings on standard error"
    assert "tokens/s" in outputs[1].data["text/html"]


def test_the_runtime_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, llmlab as ll; ll.LLM, ll.AsyncLLM; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_vocab_of_the_toy_matches_its_tokenizer(engine: ToyEngine) -> None:
    assert Tokenizer(engine.path).vocab_size == vocab_size()
