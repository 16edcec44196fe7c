"""The batching monitor without a browser: what it shows against the core's own batches, stepping, knobs, replay."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from toy import ToyBackend
from toy_engine import ToyEngine, ToyManifest, greedy, write_tokenizer

from llmlab.errors import InputError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.llm import LLM
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.trace import Recorder, Trace, record
from llmlab.widgets.monitor.panel import monitor
from llmlab.widgets.monitor.timeline import cell_text

SHARED = list(range(3, 19))
TRAFFIC = [[*SHARED, 20 + i, 30 + i] for i in range(3)] + [[40] * 13, [50, 51]]


class Noted(ToyBackend):
    """Keeps every batch, as a second set of books."""

    def __init__(self, **options):
        super().__init__(**options)
        self.batches = []

    def execute(self, batch):
        self.batches.append((batch.block_table.copy(), batch.kv_len.tolist(), np.diff(batch.query_start).tolist()))
        return super().execute(batch)


class PagedEngine(ToyEngine):
    """A toy engine whose pool is as large as it is asked for."""

    def backend(self, *, max_num_seqs, threads=None, kv_blocks=None, **pool):
        self.options = {**self.options, "num_blocks": kv_blocks or 64}
        return super().backend(max_num_seqs=max_num_seqs, threads=threads)


@pytest.fixture
def watch(tmp_path: Path):
    opened = []

    def make(prompts=TRAFFIC, max_tokens=12, **options):
        write_tokenizer(tmp_path / "toy")
        engine = PagedEngine(tmp_path / "toy", ToyManifest(max_seq_len=96), kind=Noted)
        defaults = {"kv_blocks": 64, "max_num_seqs": 4, "max_tokens_per_step": 16}
        panel = monitor(engine, **{**defaults, **options})
        opened.append(panel)
        if len(prompts):
            panel.submit(prompts, max_tokens=max_tokens, ignore_eos=True)
        return panel

    yield make
    for panel in opened:
        panel.close()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def cells(html: str) -> Counter:
    return Counter(part.split('"')[0] for part in html.split('data-cell="')[1:])


def blocks(html: str) -> list[str]:
    return [part.split('"')[0] for part in html.split('data-state="')[1:]]


@pytest.mark.parametrize("kv_blocks", [64, 12])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_timeline_is_what_the_backend_was_given(watch, kv_blocks, prefix_cache):
    panel = watch(kv_blocks=kv_blocks, prefix_cache=prefix_cache)
    panel.run()
    batches = panel.core.backend.batches
    assert len(batches) == len(panel.steps) == panel.core.stats.total.steps
    seen: Counter[str] = Counter()
    prompts = {str(i + 1): len(p) for i, p in enumerate(TRAFFIC)}
    for (tables, ends, counts), step in zip(batches, panel.steps, strict=True):
        rows = Counter((end - count, count) for end, count in zip(ends, counts, strict=True))
        working = [s for s in step.sequences if s.count]
        assert Counter((s.start, s.count) for s in working) == rows
        assert step.prefill_tokens + step.decode_tokens == sum(counts) and step.num_running == len(counts)
        for s in working:
            decodes = s.count == 1 and s.start >= prompts[s.name]
            assert s.state == ("decode" if decodes else "prefill")
            assert cell_text(s).startswith("d" if decodes else f"P{s.count}")
        assert step.decode_tokens == sum(s.state == "decode" for s in working) and not step.integrity
        tables_now = {tuple(b for b in table if b >= 0) for table in tables.tolist()}
        assert all(s.blocks in tables_now for s in working if not s.finish_reason)
        seen.update(s.state for s in step.sequences)
    assert sum(step.preemptions for step in panel.steps) == seen["preempted"] == panel.core.stats.total.preemptions
    assert (seen["preempted"] > 0) == (kv_blocks == 12), "the small pool preempts, the large one doesn't"
    for i, prompt in enumerate(TRAFFIC):
        output = panel.to_dict()["requests"][i]
        assert (output["num_tokens"], output["finish_reason"]) == (12, "length")
        assert output["text"] == panel._run.live().source.tokenizer.decode(greedy(prompt, 12, eos=None))


def test_one_step_is_one_step_of_the_core(watch, monkeypatch):
    calls, step = [], EngineCore.step
    monkeypatch.setattr(EngineCore, "step", lambda self: (calls.append(1), step(self))[1])
    panel = watch()
    panel.step()
    assert len(calls) == 1 and len(panel.steps) == 1
    panel.act("step")
    until(lambda: len(panel.steps) == 2)
    assert len(calls) == 2
    panel.step(3)
    assert len(calls) == 5 == panel.core.backend.steps


def test_shared_blocks_are_marked_and_only_those(watch):
    panel = watch(prefix_cache=True, max_tokens_per_step=64)
    while panel.step() is not None:
        step = panel.steps[-1]
        owners = Counter(b for s in step.sequences for b in s.blocks)
        counted = [references for references, _, _ in panel.core.blocks.states()]
        html = str(panel.draw_blocks())
        drawn = blocks(html)
        for block, record_ in enumerate(step.blocks):
            assert len(record_.owners) == record_.references == owners[block] == counted[block]
            assert (drawn[block] == "shared") == (counted[block] > 1)
            assert counted[block] < 2 or f"×{counted[block]}" in html
    assert max(step.shared_blocks for step in panel.steps) == 0, "prompts that come together compute each their own"
    panel.submit([[*SHARED, 9], [*SHARED, 8]], max_tokens=4, ignore_eos=True)
    panel.step()
    assert panel.steps[-1].shared_blocks == 4 and panel.steps[-1].cached_tokens == 32
    assert "shared by 2 requests: 6, 7" in panel.html()
    panel.run()
    assert panel.steps[-1].shared_blocks == 0 and "cached" in blocks(str(panel.draw_blocks()))


def test_the_light_goes_red_when_a_block_is_lost(watch):
    panel = watch()
    panel.step(2)
    assert "Books balance" in panel.html() and 'class="light"' in panel.html()
    panel.core.blocks.allocate_one()  # behind the scheduler's back
    panel.step()
    assert "Books don&#39;t balance: block" in panel.html() and 'class="light bad"' in panel.html()
    assert "sequences hold it" in panel.steps[-1].integrity and "don't balance" in str(panel)
    panel.act("look", "0")
    assert "Books balance" in panel.html(), "an earlier step is shown as it was"


def test_preemption_is_shown(watch):
    panel = watch(kv_blocks=12)
    panel.run()
    place = next(i for i, step in enumerate(panel.steps) if step.preemptions)
    [victim] = [s for s in panel.steps[place].sequences if s.state == "preempted"]
    assert not victim.blocks and victim.count == 0
    later = [s for step in panel.steps[place + 1 :] for s in step.sequences if s.name == victim.name]
    assert next(s.state for s in later if s.state != "waiting") == "prefill", "it is computed again"
    panel.act("look", str(place))
    assert cells(panel.html())["preempted"] >= 1 and "1 preempted" in panel.html()


def test_a_prompt_is_split_and_others_are_held(watch):
    panel = watch([[7] * 40, [8] * 40, [9] * 3], max_tokens=3)
    panel.run()
    first = [s.count for step in panel.steps for s in step.sequences if s.name == "1" and s.state == "prefill"]
    assert first == [16, 16, 8]
    assert cells(panel.html())["prefill"] >= 6


def test_cancelling_waiting_and_running_requests(watch):
    panel = watch(max_num_seqs=2)
    panel.step(2)
    panel.act("cancel", "1")
    panel.act("cancel", "5")
    panel.step()
    states = {s.name: s for s in panel.steps[-1].sequences}
    assert states["1"].state == states["5"].state == "ended" and states["1"].finish_reason == "cancelled"
    assert cell_text(states["1"]) == "✗"
    panel.run()
    assert not panel.steps[-1].integrity and all(not b.owners for b in panel.steps[-1].blocks)
    assert "no request" in panel.act("cancel", "77")["problem"]


def test_knobs_begin_again_with_the_same_requests(watch):
    panel = watch()
    panel.step(3)
    late = panel.submit([60, 61, 62], max_tokens=5, ignore_eos=True)
    panel.run()
    answers = [r["text"] for r in panel.to_dict()["requests"]]
    steps = len(panel.steps)
    panel.act("knob", "max_num_seqs", 1)
    until(lambda: not panel.steps)
    panel.run()
    assert len(panel.steps) > steps and [r["text"] for r in panel.to_dict()["requests"]] == answers
    first = next(i for i, step in enumerate(panel.steps) if any(s.name == late[0] for s in step.sequences))
    assert first == 3
    panel.restart(max_num_seqs=4, kv_blocks=20, prefix_cache=True, batching="static")
    panel.run()
    assert [r["text"] for r in panel.to_dict()["requests"]] == answers and panel.trace.num_blocks == 20
    panel.act("knob", "max_num_seqs", 99)
    until(lambda: panel.problem)
    assert "max_tokens_per_step is 16" in panel.html() and panel.trace.max_num_seqs == 4
    with pytest.raises(InputError, match="no knob 'blocks'"):
        panel.restart(blocks=3)
    with pytest.raises(InputError, match="kv_blocks is 0"):
        panel.restart(kv_blocks=0)
    assert panel.run() == 0, "what couldn't begin changed nothing"


def test_static_batching_waits_for_the_whole_batch(watch):
    panel = watch([[i] * 4 for i in range(1, 7)], max_tokens=4, max_num_seqs=2, batching="static")
    panel.submit([9] * 3, max_tokens=1)
    panel.run()
    running = [frozenset(s.name for s in step.sequences if s.count) for step in panel.steps]
    assert {"1", "2"} in running and not any({"2", "3"} <= names for names in running)


def test_play_pause_and_what_is_typed(watch):
    panel = watch([])
    heard = []
    panel.listen(heard.append)
    assert "type one a line" in panel.act("submit", "", {"prompts": " \n"})["problem"]
    panel.act("submit", "", {"prompts": "the cat\n\nthat was that", "max_tokens": 30})
    assert panel.to_dict()["requests"][1]["prompt"] == "that was that" and "comes before step 1" in panel.html()
    panel.act("speed", "", 100)
    panel.act("play")
    until(lambda: len(panel.steps) >= 3)
    panel.act("pause")
    time.sleep(0.1)
    done = len(panel.steps)
    time.sleep(0.1)
    assert len(panel.steps) == done and "Play" in panel.html()
    panel.act("play")
    until(lambda: not panel.playing)
    assert "All requests are done" in panel.html()
    assert any("timeline" in drawn for drawn in heard)
    assert "expected at most" in panel.act("submit", "", {"prompts": "cat " * 400, "max_tokens": 3})["problem"]
    assert "max_tokens is 0" in panel.act("submit", "", {"prompts": "cat", "max_tokens": 0})["problem"]
    panel.act("clear")
    until(lambda: not panel.steps)
    assert not panel.to_dict()["requests"]


def test_closing_while_it_plays(watch):
    panel = watch()
    panel.act("speed", "", 100)
    panel.act("play")
    until(lambda: panel.steps)
    panel.close()
    panel.close()
    assert not panel._player._thread.is_alive()
    assert "closed" in panel.act("step")["problem"]
    with pytest.raises(InputError, match="closed"):
        panel.step()


def test_a_recorded_run_is_kept_and_replayed(watch, tmp_path):
    engine = PagedEngine(tmp_path / "toy", ToyManifest(max_seq_len=96))
    write_tokenizer(tmp_path / "toy")
    with LLM(engine, max_num_seqs=3, max_tokens_per_step=16, prefix_cache=True) as llm:
        with record(llm.core) as trace:
            llm.generate(TRAFFIC, SamplingParams(max_tokens=5, n=1, ignore_eos=True))
            with pytest.raises(InputError, match="recorded already"):
                Recorder(llm.core)
        count = len(trace.steps)
        assert count == llm.core.stats.total.steps and llm.core.observer is None
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
        assert len(trace.steps) == count, "nothing is recorded after the end"
    assert Trace.load(trace.save(tmp_path / "trace.json")) == trace
    panel = monitor(trace)
    assert len(panel.steps) == count and "recorded run" in panel.title() and cells(panel.html())["prefill"]
    panel.restart()
    assert not panel.steps
    panel.step(2)
    assert panel.steps == trace.steps[:2]
    assert panel.run() == count - 2 and "last step" in panel.html()
    with pytest.raises(InputError, match="nothing runs"):
        panel.submit("more")
    with pytest.raises(InputError, match="has its requests"):
        monitor(trace, ["more"])
    panel.close()


@pytest.mark.parametrize("data", [{}, [], {"format": 99}, {"format": 1, "steps": [{"a": 1}]}])
def test_damaged_traces_are_refused(data):
    with pytest.raises(InputError, match="trace"):
        Trace.from_dict(data)


def test_completions_of_one_request_share_its_prompt(tmp_path):
    write_tokenizer(tmp_path / "toy")
    with LLM(PagedEngine(tmp_path / "toy"), max_num_seqs=4) as llm, record(llm.core) as trace:
        llm.generate(SHARED, SamplingParams(max_tokens=4, n=3, temperature=1.0, ignore_eos=True))
    names = {s.name for step in trace.steps for s in step.sequences}
    assert len(names) == 3 and max(len(b.owners) for step in trace.steps for b in step.blocks) == 3


@pytest.mark.slow
def test_slots_are_blocks_of_one_sequence(store):
    panel = monitor(store.engine("tinychat"), ["Who are you?"] * 3, max_tokens=4, kv_blocks=2)
    panel.run()
    assert panel.trace.num_blocks == 2 and all(len(b.owners) <= 1 for step in panel.steps for b in step.blocks)
    assert "one block (a slot) a sequence" in panel.title()
    texts = {r["text"] for r in panel.to_dict()["requests"]}
    assert len(texts) == 1 and "" not in texts
    panel.close()


def test_what_cannot_be_monitored(tmp_path):
    with pytest.raises(InputError, match="can't monitor a int"):
        monitor(3)
    write_tokenizer(tmp_path / "toy")
    with pytest.raises(InputError, match="block_size is for graphs"):
        monitor(PagedEngine(tmp_path / "toy"), block_size=4)


@pytest.mark.slow
def test_the_paged_reference_says_what_the_engine_says(store):
    asked = ["How do I count to nine in French?", "What is 17 plus 25?", "How do I count to nine in German?"]
    panel = monitor(store.serving("tinychat"), asked, max_tokens=24, kv_blocks=14, prefix_cache=True)
    panel.run()
    assert sum(step.preemptions for step in panel.steps) > 0 and not any(step.integrity for step in panel.steps)
    with LLM(store.engine("tinychat")) as llm:
        params = SamplingParams(max_tokens=24, temperature=0)
        said = [llm.chat([{"role": "user", "content": text}], params).text for text in asked]
    assert [r["text"] for r in panel.to_dict()["requests"]] == said
