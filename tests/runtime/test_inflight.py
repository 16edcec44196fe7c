"""Two steps in flight on a device that samples: same tokens, nothing lost, and broken parts are noticed."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis.errors import NoSuchExample
from test_core import LAYOUTS, drain, greedy, request
from test_properties import BROKEN, EVERYTHING, play, profile, scenarios
from toy import ToyBackend, true_logits
from toy_device import ToyDevice

from llmlab.errors import EngineError
from llmlab.runtime.batch import Pipelined, StepResult
from llmlab.runtime.blocks import IntegrityError
from llmlab.runtime.core import EngineCore
from llmlab.runtime.inflight import Pipeline
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


def check_many(examples):
    happened: Counter[str] = Counter()

    @profile(examples)
    @given(scenarios())
    def run(scenario):
        happened.update(play(scenario, ToyDevice))

    run()
    return happened


def test_random_traffic_on_a_device():
    happened = check_many(250)
    assert all(happened[what] > 10 for what in (*EVERYTHING, "ahead", "dropped")), happened
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


def free_never(scheduler, sequence, *, trusted):
    sequence.in_flight -= 1
    if sequence.finished and sequence in scheduler.leaving:
        scheduler.leaving.remove(sequence)


def trust_what_failed(scheduler, sequence, *, trusted):
    Scheduler.settle(scheduler, sequence, trusted=True)


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


@pytest.mark.parametrize("what", AHEAD)
def test_broken_parts_are_noticed(what):
    device, core_class = AHEAD[what]

    def fails(scenario):
        try:
            play(scenario, device, core_class, max_steps=300)
        except (AssertionError, IntegrityError):
            return True
        return False

    try:
        scenario = find(scenarios(), fails, settings=settings(profile(2000), phases=[Phase.generate]))
    except NoSuchExample:
        pytest.fail(f"2000 scenarios did not notice: {what}")
    play(scenario, ToyDevice)  # it is the broken part that fails, not the scenario
