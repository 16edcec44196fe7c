"""The toy backend as a device that runs behind the caller's back: nothing is computed, or seen, before `result()`."""

from __future__ import annotations

from collections import deque
from dataclasses import fields, replace

import numpy as np
from toy import ToyBackend

from llmlab.runtime.batch import SamplingBatch, StepBatch, StepResult
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.sampler import GREEDY_BELOW, draw


class Step:
    """A submitted step. It may be asked for its result again and again."""

    def __init__(self, device: ToyDevice, batch: StepBatch, sampling: SamplingBatch) -> None:
        self.device, self.batch, self.sampling = device, own(batch), own(sampling)
        self.num_wanted = len(batch.logits_index)
        self.broken_off = False
        self.outcome: StepResult | Exception | None = None

    def result(self) -> StepResult:
        while self.outcome is None:
            self.device.run_oldest()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class ToyDevice(ToyBackend):
    """Implements Pipelined, and checks that the core keeps what it promises.

    fail_at and interrupt_at name steps as in ToyBackend. With `early` it is `submit` that is broken off, when half of
    the step is on its way, else waiting for the result is. lost_at: from this step on all that it does raises.
    """

    def __init__(self, *, early=False, lost_at=None, **options):
        super().__init__(**options)
        self.early = early
        self.lost_at = lost_at
        self.queue: deque[Step | list[int]] = deque()
        """What was asked for and isn't done: steps, and blocks to release."""
        self.previous = np.empty(0, np.int32)
        """What the last step sampled."""
        self.submitted = 0
        self.ahead = 0
        """Steps submitted behind another."""

    def execute(self, batch):
        raise AssertionError("a device that samples was asked for logits")

    def submit(self, batch: StepBatch, sampling: SamplingBatch) -> Step:
        if self.lost_at is not None and self.steps >= self.lost_at:
            raise RuntimeError("the toy is lost")
        in_flight = self.in_flight()
        assert len(in_flight) < 2, "a third step in flight"
        self.check_sampling(sampling, len(batch.logits_index))
        references = -1 - batch.input_ids[batch.input_ids < 0]
        assert not len(references) or (len(in_flight) == 1 and references.max() < in_flight[0].num_wanted), references
        for older in in_flight:
            self.check_owners(older.batch, batch)
        step = Step(self, batch, sampling)
        self.queue.append(step)
        self.submitted += 1
        self.ahead += len(in_flight)
        if self.early and self.submitted in self.fail_at | self.interrupt_at:
            step.broken_off = True
            if self.submitted in self.interrupt_at:
                raise KeyboardInterrupt
            raise RuntimeError("the toy\nbroke")
        return step

    def release(self, blocks):
        assert len(set(blocks)) == len(blocks)
        for step in self.in_flight():
            held = {block for row, _, _ in rows_of(step.batch) for block in row}
            assert not held & set(blocks), f"blocks {held & set(blocks)} are released while in flight"
        self.queue.append(list(blocks))

    def run_oldest(self) -> None:
        entry = self.queue[0]
        if isinstance(entry, Step):
            self.run(entry)
        else:
            super().release(entry)
        self.queue.popleft()

    def run(self, step: Step) -> None:
        batch, number = step.batch, self.steps + 1
        if number in self.interrupt_at and not step.broken_off:
            self.interrupt_at.remove(number)
            raise KeyboardInterrupt  # whoever waits gives up; the step will be done all the same
        if step.broken_off:
            self.interrupt_at.discard(number)
            self.fail_at.add(number)
        if self.lost_at is not None and number >= self.lost_at:
            self.steps, step.outcome = number, RuntimeError("the toy is lost")
            return
        references = batch.input_ids < 0
        batch.input_ids[references] = np.maximum(self.previous[-1 - batch.input_ids[references]], 0)
        try:
            logits = super().execute(batch)
        except RuntimeError as error:
            self.previous, step.outcome = np.full(step.num_wanted, -1, np.int32), error
            return
        tokens = [self.choose(row, logits[row], step.sampling) for row in range(step.num_wanted)]
        self.previous = np.array(tokens, np.int32)
        step.outcome = StepResult(self.previous, logits[step.sampling.host_rows])

    def choose(self, row: int, logits: np.ndarray, sampling: SamplingBatch) -> int:
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            return -1
        if sampling.temperature[row] < GREEDY_BELOW:
            return best
        names = ("temperature", "top_k", "top_p", "min_p")
        params = SamplingParams(**{name: getattr(sampling, name)[row].item() for name in names})
        return draw(logits, logits[best], params, float(sampling.uniform[row]))

    def in_flight(self) -> list[Step]:
        return [entry for entry in self.queue if isinstance(entry, Step) and not entry.broken_off]

    def check_sampling(self, sampling: SamplingBatch, num_wanted: int) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "uniform"):
            array = getattr(sampling, name)
            assert array.shape == (num_wanted,) and array.dtype == (np.int32 if name == "top_k" else np.float32), name
        rows = sampling.host_rows
        assert rows.dtype == np.int32 and set(rows.tolist()) <= set(range(num_wanted)) and (np.diff(rows) > 0).all()

    def check_owners(self, older: StepBatch, newer: StepBatch) -> None:
        """Only the sequence that a step in flight writes blocks for may use them, going on where that step ends.

        What the step in flight only reads may be read, not written.
        """
        size = self.limits.block_size
        for row, start, _ in rows_of(newer):
            for theirs, from_, to in rows_of(older):
                if start == to and row[: len(theirs)] == theirs:
                    continue
                clash = set(row) & set(theirs[from_ // size :]) | set(row[start // size :]) & set(theirs)
                assert not clash, f"blocks {clash} are used again while in flight"
        used = {block for row, _, _ in rows_of(older) for block in row}
        assert not used & {copy.dst for copy in newer.copies}, "a block is copied to while in flight"


def rows_of(batch: StepBatch):
    """(blocks, first new token, length) of each sequence."""
    lengths = batch.kv_len.tolist()
    starts = (batch.kv_len - np.diff(batch.query_start)).tolist()
    for row, start, length in zip(batch.block_table.tolist(), starts, lengths, strict=True):
        yield [block for block in row if block >= 0], start, length


def own(batch):
    """A copy whose arrays the caller can't change."""
    arrays = {f.name: getattr(batch, f.name).copy() for f in fields(batch) if f.name != "copies"}
    return replace(batch, **arrays)
