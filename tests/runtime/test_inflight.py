"""Two steps in flight on a device that samples: same tokens, nothing lost, and broken parts are noticed."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from test_core import LAYOUTS, drain, greedy, request
from test_properties import EVERYTHING, Job, Scenario, answer, play, profile, scenarios
from toy import ToyBackend
from toy_device import ToyDevice
from toy_engine import ToyEngine, write_tokenizer

from llmlab.runtime.batch import Pipelined
from llmlab.runtime.blocks import IntegrityError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.inflight import Pipeline
from llmlab.runtime.llm import LLM
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.scheduler import Scheduler


def make(device=ToyDevice, *, seqs=4, budget=16, eos=(), prefix_cache=False, batching="inflight", **options):
    return EngineCore(
        device(**options),
        max_num_seqs=seqs,
        max_tokens_per_step=budget,
        eos_token_ids=eos,
        prefix_cache=prefix_cache,
        batching=batching,
    )


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_model_without_a_pool(layout, prefix_cache):
    core = make(prefix_cache=prefix_cache, **layout)
    assert isinstance(core.backend, Pipelined)
    prompts = {"a": [1, 2, 3], "b": [1, 2, 3, 4, 5, 6], "c": [9], "d": list(range(20)), "e": [1, 2, 3, 4, 5, 6]}
    for name, prompt in prompts.items():
        core.add(request(name, prompt, max_tokens=9))
    assert drain(core) == {(name, 0): (greedy(prompt, 9), "length") for name, prompt in prompts.items()}
    assert core.stats.total.dropped_tokens == 0, "that a sequence ends by its length is known beforehand"
    assert core.backend.ahead > core.backend.steps / 2


def test_a_sequence_that_turns_out_to_have_ended_keeps_its_blocks_until_its_last_step_is_over():
    second = greedy([1, 2], 2)[1]
    core = make(eos=(second,), block_size=1)
    core.add(request("r", [1, 2], max_tokens=9))
    core.step()
    [update] = core.step()
    assert update.finish_reason == "stop" and core.backend.released == [] and core.has_work
    assert core.step() == [] and not core.has_work
    core.check_integrity()
    core.add(request("next", [3], max_tokens=1))
    drain(core)
    assert core.stats.total.dropped_tokens == 1 and set(core.backend.released) >= {0, 1, 2}


def test_cancel_with_two_steps_in_flight():
    core = make()
    core.add(request("gone", [1, 2], max_tokens=9))
    core.add(request("stays", [3, 4], max_tokens=9))
    first = [update.token_ids for update in core.step()]
    core.cancel("gone")
    core.check_integrity()
    core.add(request("new", [1, 2], max_tokens=9))
    results = drain(core)
    assert results["gone", 0] == ([], "cancelled") and core.stats.total.dropped_tokens == 1
    assert first[1] + results["stays", 0][0] == greedy([3, 4], 9)
    assert results["new", 0] == (greedy([1, 2], 9), "length")


def test_tokens_that_the_host_chooses_hold_up_nobody_else():
    core = make(seqs=9, budget=32)
    core.add(request("host", [1], max_tokens=5, repetition_penalty=1.5))
    for index in range(8):
        core.add(request(f"{index}", [2, index], max_tokens=9))
    told: dict[str, list[int]] = {}
    for number in range(9):
        for update in core.step():
            told.setdefault(update.request_id, []).append(number)
    assert told["host"] == [0, 2, 4, 6, 8]
    assert all(told[f"{index}"] == list(range(9)) for index in range(8))


def test_where_the_host_chooses_many_tokens_the_pipeline_drains():
    core = make(seqs=9, budget=32)
    for index in range(3):
        core.add(request(f"host {index}", [1, index], max_tokens=5, presence_penalty=0.5))
    for index in range(6):
        core.add(request(f"{index}", [2, index], max_tokens=5))
    for _ in range(5):
        assert len(core.step()) == 9
    assert core.backend.ahead == 0 and not core.has_work


def test_a_lost_device_ends_every_request_with_its_error():
    core = make(seqs=2, lost_at=4)
    for index in range(7):
        core.add(request(f"{index}", [index, 1], max_tokens=9))
    results = drain(core)
    assert [reason for _, reason in results.values()] == ["error"] * 7
    assert results["0", 0][0] == greedy([0, 1], 3)
    core.add(request("late", [1]))
    [update] = core.step()
    assert "RuntimeError: the toy is lost" in update.error and not core.has_work


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"token_ids": np.zeros(2, np.int32)}, "tokens of shape (2,), expected (1,)"),
        ({"token_ids": np.array([32], np.int32)}, "the backend chose token id 32"),
        ({"logits": np.zeros((1, 5), np.float32)}, "logits of shape (1, 5), expected (0, 32)"),
    ],
)
def test_results_that_cannot_be_are_errors(result, message):
    class Odd(ToyDevice):
        def run(self, step):
            super().run(step)
            step.outcome = step.outcome._replace(**result)

    core = make(Odd)
    core.add(request("r", [1]))
    [update] = core.step()
    assert update.finish_reason == "error" and message in update.error
    assert drain(core) == {}


def test_broken_logits_end_only_their_sequence():
    class Nan(ToyDevice):
        def choose(self, row, logits, sampling):
            if self.steps == 2 and row == 0:
                logits = logits * np.float32(np.nan)
            return super().choose(row, logits, sampling)

    core = make(Nan, prefix_cache=True)
    core.add(request("bad", [1, 2, 3], max_tokens=5))
    core.add(request("good", [4, 5, 6], max_tokens=5))
    results = drain(core)
    assert results["bad", 0] == (greedy([1, 2, 3], 1), "error")
    assert results["good", 0] == (greedy([4, 5, 6], 5), "length")


def test_llm_says_the_same_on_a_device(tmp_path: Path):
    write_tokenizer(tmp_path)
    asked = [
        SamplingParams(max_tokens=20, temperature=0.0),
        SamplingParams(max_tokens=20, temperature=1.0, seed=3, top_k=20, top_p=0.9, min_p=0.01, n=2),
        SamplingParams(max_tokens=12, temperature=0.7, seed=4, repetition_penalty=1.3, logprobs=2),
        SamplingParams(max_tokens=12, temperature=0.7, seed=5, logprobs=1, stop=list("abcdefghijklmnopqrstuvwxyz")),
        SamplingParams(max_tokens=12, seed=6, min_tokens=5, logit_bias={0: 3.0}),
    ]
    prompts = ["the cat sat on", "count", "nine", "that mat", "to"]
    said = []
    for kind in (ToyBackend, ToyDevice):
        with LLM(ToyEngine(tmp_path, kind=kind), max_num_seqs=4, max_tokens_per_step=12) as llm:
            results = llm.generate(prompts, asked, progress=False)
            results += llm.generate(prompts, asked[3], progress=False)
            said.append([[(c.text, c.token_ids, c.finish_reason, c.logprobs) for c in r.completions] for r in results])
            assert (llm.core.stats.total.dropped_tokens > 0) == (kind is ToyDevice)
    assert said[0] == said[1]


def check_many(examples):
    happened: Counter[str] = Counter()

    @profile(examples)
    @given(scenarios())
    def run(scenario):
        happened.update(play(scenario, ToyDevice))

    run()
    return happened


def test_random_traffic_on_a_device():
    happened = check_many(120)
    assert all(happened[what] > 3 for what in (*EVERYTHING, "ahead", "dropped")), happened
    assert happened["ahead"] > happened["steps"] / 2, happened


@pytest.mark.slow
def test_random_traffic_on_a_device_at_length():
    happened = check_many(5000)
    assert all(happened[what] > 100 for what in (*EVERYTHING, "ahead", "dropped")), happened


# Broken parts.


class WrongRow(ToyDevice):
    """Goes on with the token of the next row."""

    def run(self, step):
        ids = step.batch.input_ids
        ids[ids < 0] = -1 - (-ids[ids < 0] % len(self.previous)) if len(self.previous) else 0
        super().run(step)


class StaleToken(ToyDevice):
    """Goes on with the token of the step before the last one."""

    older = np.zeros(0, np.int32)

    def run(self, step):
        latest = self.previous
        self.previous = np.resize(self.older, len(latest)) if len(self.older) else latest
        super().run(step)
        self.older = latest


class StaleLength(ToyDevice):
    """In a step behind another, the keys of the one in flight aren't there yet."""

    def submit(self, batch, sampling):
        behind = bool(self.in_flight())
        step = super().submit(batch, sampling)
        if behind:
            step.batch = replace(step.batch, kv_len=np.maximum(step.batch.kv_len - 1, np.diff(batch.query_start)))
            positions = step.batch.position_ids
            positions[:] = np.concatenate([range(start, to) for _, start, to in self.rows(step.batch)])
        return step

    @staticmethod
    def rows(batch):
        counts = np.diff(batch.query_start)
        return [(None, int(end - count), int(end)) for end, count in zip(batch.kv_len, counts, strict=True)]


class OutOfOrder(ToyDevice):
    """Runs the newest step first."""

    def run_oldest(self):
        self.queue.reverse()
        super().run_oldest()
        self.queue.reverse()


class UniformOfAnotherRow(ToyDevice):
    def submit(self, batch, sampling):
        return super().submit(batch, replace(sampling, uniform=np.roll(sampling.uniform, 1)))


def broken(part, name, method):
    """An EngineCore one of whose parts has a method replaced."""

    class Broken(EngineCore):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            target = {"core": self, "scheduler": self._scheduler, "pipeline": self._pipeline}[part]
            setattr(target, name, functools.partial(method, target))

    return Broken


def free_at_once(scheduler, sequence, *, keep_blocks=True):
    """The blocks of an ended sequence are free while a step in flight writes them."""
    Scheduler.remove(scheduler, sequence, keep_blocks=keep_blocks)
    if sequence.in_flight:
        scheduler.blocks.free(sequence.blocks, keep=keep_blocks)


def free_never(scheduler, work, *, trusted):
    for sequence, _ in work:
        sequence.in_flight -= 1
        if sequence in scheduler.leaving and not sequence.in_flight:
            scheduler.leaving.remove(sequence)
    return 0


def trust_what_failed(scheduler, work, *, trusted):
    return Scheduler.settle(scheduler, work, trusted=True)


def deliver_to_the_ended(core, flight, samples):
    """The token that was computed too many is told."""
    for row in flight.ready:
        sequence = flight.work[row].sequence
        if sequence.finished and not sequence.request_id.startswith("gone"):
            flight.work[row] = flight.work[row]._replace(sequence=replace(sequence, status=None, in_flight=0))
    return EngineCore._append(core, flight, samples)


def ignore_failures_ahead(pipeline):
    """A step behind a failed one counts."""
    flight, samples = Pipeline.land(pipeline)
    for later in pipeline.flights:
        later.void = False
    return flight, samples


def keep_unknown_tokens(core, flight):
    for sequence, _ in flight.work:
        if not sequence.finished:
            core._scheduler.preempt(sequence, keep_blocks=False)


def go_on_past_the_host(pipeline, plan):
    """Also those whose token the host has to choose go on with the device's."""
    pack = pipeline._sampling.pack
    pipeline._sampling.pack = lambda sequences: (pack(sequences)[0], set())
    try:
        Pipeline.launch(pipeline, plan)
    finally:
        pipeline._sampling.pack = pack


def preempt_in_flight(scheduler, *, ahead=False):
    return Scheduler.schedule(scheduler)


AHEAD = {
    "token of the wrong row": (WrongRow, EngineCore),
    "token of the wrong step": (StaleToken, EngineCore),
    "stale length": (StaleLength, EngineCore),
    "steps out of order": (OutOfOrder, EngineCore),
    "another's random number": (UniformOfAnotherRow, EngineCore),
    "block reused in flight": (ToyDevice, broken("scheduler", "remove", free_at_once)),
    "blocks never come back": (ToyDevice, broken("scheduler", "settle", free_never)),
    "a failed step's blocks": (ToyDevice, broken("scheduler", "settle", trust_what_failed)),
    "ended, yet told": (ToyDevice, broken("core", "_append", deliver_to_the_ended)),
    "a failure's successor": (ToyDevice, broken("pipeline", "land", ignore_failures_ahead)),
    "unknown tokens stay": (ToyDevice, broken("core", "_start_over", keep_unknown_tokens)),
    "the host isn't asked": (ToyDevice, broken("pipeline", "launch", go_on_past_the_host)),
    "preempted in flight": (ToyDevice, broken("scheduler", "schedule", preempt_in_flight)),
}


JOB = Job(0, (1, 2, 3), 13, 1, 0.0, (), None, None, None)
BUSY = Scenario(
    block_size=4,
    num_blocks=13,
    max_num_seqs=3,
    budget=8,
    prefix_cache=True,
    batching="inflight",
    fails_at=None,
    interrupted_at=None,
    early=False,
    jobs=(
        replace(JOB, max_tokens=24),
        replace(JOB, arrives=1, prompt=(5,) * 11, temperature=1.0),
        replace(JOB, arrives=2, prompt=(2, 1), stop_token_ids=answer((2, 1))[4:5]),
        replace(JOB, arrives=4, prompt=(1, 2, 3, *answer((1, 2, 3))[:3]), asks="penalty"),
        replace(JOB, arrives=6, prompt=(2, 1, *answer((2, 1))[:5], 7), max_tokens=7),
        replace(JOB, arrives=7, prompt=(1, 2, 3), temperature=1.0, n=2, finished=3),
        replace(JOB, arrives=9, prompt=(2, 1, *answer((2, 1))[:5]), cancelled=12),
        replace(JOB, arrives=14, prompt=(5,) * 7, temperature=1.0, asks="logprobs"),
    ),
)
CASES = [BUSY, replace(BUSY, block_size=1, num_blocks=60), replace(BUSY, prefix_cache=False, num_blocks=8)]
FOLLOW = replace(BUSY, block_size=16, num_blocks=4, jobs=(BUSY.jobs[0], replace(BUSY.jobs[3], arrives=5, asks=None)))
CASES += [replace(FOLLOW, fails_at=at) for at in range(4, 10)]
CASES += [replace(BUSY, fails_at=at) for at in range(2, 26)]
CASES += [replace(BUSY, fails_at=at, early=True) for at in range(2, 26, 5)]
CASES += [replace(BUSY, early=early, interrupted_at=at) for early in (False, True) for at in range(2, 16, 3)]


def test_the_cases_are_real():
    happened = sum((play(case, ToyDevice) for case in CASES), Counter())
    assert all(happened[what] for what in (*EVERYTHING, "ahead", "dropped") if what not in ("refused", "error")), (
        happened
    )


@pytest.mark.parametrize("what", AHEAD)
def test_broken_parts_are_noticed(what):
    device, core_class = AHEAD[what]
    for case in CASES:
        try:
            play(case, device, core_class, max_steps=150)
        except (AssertionError, IntegrityError):
            return
    pytest.fail(f"{len(CASES)} cases did not notice: {what}")
