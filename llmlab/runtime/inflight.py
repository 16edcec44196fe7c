"""Steps in flight: handed to the backend, their outcome not taken in yet.

With a Pipelined backend the next step is scheduled, packed and submitted while the last one runs, so that the device
need not wait for the host. It goes on from tokens that only the device knows so far:

    host     | schedule, pack, submit n+1 | wait for n | take in n, tell callers | schedule, pack, submit n+2 | ...
    device   | step n                                  | step n+1                                             | ...

What the host learns of step n may end a sequence that is in step n+1 already. That row is then dropped, and the blocks
that it writes stay the sequence's until step n+1 is over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import EngineError, LlmlabError
from llmlab.runtime.batch import Backend, Pending, Pipelined
from llmlab.runtime.packing import SamplingPacker, pack
from llmlab.runtime.request import Sequence
from llmlab.runtime.sampler import Sample, Sampler, token_logprobs
from llmlab.runtime.scheduler import Schedule, Work
from llmlab.runtime.stats import StepStats

MOST_IN_FLIGHT = 2
AHEAD_PER_HELD = 4
"""For each sequence that can't go on before the host has chosen its token, this many must be able to, or the pipeline
drains. Running ahead gives each held one only every other step; draining costs a step's host time, about a tenth of a
decode's, for everyone."""

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class Flight:
    """One step in flight. A row is what the step does for one sequence of `work`."""

    work: list[Work]
    ends: list[int]
    """For each row, the tokens that have keys and values after the step."""
    ready: list[int]
    """Rows whose sequence gets a token, in the order of the logits."""
    stats: StepStats
    outcome: Pending | NDArray[np.float32] | EngineError | None = None
    """None until the backend has taken the step, so an interrupted one keeps it."""
    host_rows: list[int] = field(default_factory=list)
    """Which of `ready` come with their logits."""
    leads: bool = False
    """Whether the next step may be submitted before this one is over."""
    void: bool = False
    """A step before this one failed, so nothing that it did counts."""


class Pipeline:
    """The steps in flight on one backend, oldest first: one with a plain backend, two with a Pipelined one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._pipelined = backend if isinstance(backend, Pipelined) else None
        self._sampler = Sampler()
        self._sampling = SamplingPacker()
        self.flights: deque[Flight] = deque()

    @property
    def has_room(self) -> bool:
        """Whether the next step can be launched before one lands."""
        return not self.flights or (len(self.flights) < MOST_IN_FLIGHT and self.flights[-1].leads)

    def launch(self, plan: Schedule) -> None:
        """Hand a step to the backend. Its errors come out of `land`; an interruption comes out of here."""
        batch, ready = pack(plan)
        flight = Flight(plan.work, batch.kv_len.tolist(), ready, _count(plan))
        self.flights.append(flight)
        for sequence, count in plan.work:
            sequence.num_computed += count
            sequence.in_flight += 1
        try:
            if self._pipelined is None:
                flight.outcome = self._call(flight, self._backend.execute, batch)
                _check_shape("logits", flight.outcome, len(ready), self._backend.limits.vocab_size)
            else:
                sequences = [plan.work[row].sequence for row in ready]
                sampling, held = self._sampling.pack(sequences)
                flight.host_rows = sampling.host_rows.tolist()
                flight.outcome = self._call(flight, self._pipelined.submit, batch, sampling)
                _go_on(flight, sequences, held)
        except EngineError as error:
            flight.outcome = error

    def land(self) -> tuple[Flight, list[Sample] | EngineError]:
        """Wait for the oldest step: what it sampled, one for each of `ready`, or what went wrong.

        An interruption leaves the step in flight. A failure voids the steps behind it.
        """
        flight = self.flights[0]
        samples: list[Sample] | EngineError
        try:
            samples = self._samples(flight)
        except EngineError as error:
            samples = error
            for later in list(self.flights)[1:]:
                later.void, later.leads = True, False
        self.flights.popleft()
        return flight, samples

    def _samples(self, flight: Flight) -> list[Sample]:
        outcome, sequences = flight.outcome, [flight.work[row].sequence for row in flight.ready]
        if outcome is None:
            flight.void = True
            return []
        if isinstance(outcome, EngineError):
            raise outcome
        if isinstance(outcome, np.ndarray):
            return self._sampler.sample(outcome, sequences) if sequences else []
        token_ids, logits = self._call(flight, outcome.result)
        _check_shape("tokens", token_ids, len(flight.ready))
        _check_shape("logits", logits, len(flight.host_rows), self._backend.limits.vocab_size)
        if token_ids.max(initial=-1) >= self._backend.limits.vocab_size:
            raise EngineError(f"the backend chose token id {token_ids.max()}, which the vocabulary doesn't have")
        samples = [Sample(token if token >= 0 else None) for token in token_ids.tolist()]
        for row, values in zip(flight.host_rows, logits, strict=True):
            samples[row] = self._choose(values, samples[row].token_id, sequences[row])
        return samples

    def _choose(self, logits: NDArray[np.float32], token: int | None, sequence: Sequence) -> Sample:
        """A sequence's sample from its logits [vocab] and the token that the device chose."""
        if token is None or sequence.finished:
            return Sample(None)
        if sequence.adjusts_logits:
            return self._sampler.sample(logits[None], [sequence])[0]
        return Sample(token, token_logprobs(logits, token, sequence.params.logprobs or 0))

    @staticmethod
    def _call(flight: Flight, function: Callable[..., _T], *arguments: object) -> _T:
        """Call the backend; whatever it raises becomes an EngineError."""
        started = time.perf_counter()
        try:
            return function(*arguments)
        except LlmlabError as error:
            raise EngineError(str(error)) from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise EngineError(f"the backend failed in a step of {len(flight.work)} sequences: {reason}") from error
        finally:
            flight.stats.execute_s += time.perf_counter() - started


def _go_on(flight: Flight, sequences: list[Sequence], held: set[int]) -> None:
    """Let each of `sequences`, which get a token, go on with the one that the device is about to choose.

    Not those that end with it, and not those in the rows of `held`, whose token the host has to choose.
    """
    num_gone = num_held = 0
    for row, sequence in enumerate(sequences):
        if sequence.num_tokens + 1 == len(sequence.tokens):
            continue
        if row in held:
            num_held += 1
        else:
            sequence.append(-1 - row)
            num_gone += 1
    num_split = len(flight.work) - len(sequences)
    flight.leads = AHEAD_PER_HELD * num_held <= num_gone + num_split


def _check_shape(what: str, array: NDArray, *expected: int) -> None:
    if array.shape != expected:
        raise EngineError(f"the backend returned {what} of shape {array.shape}, expected {expected}")


def _count(plan: Schedule) -> StepStats:
    num_tokens = num_decoded = 0
    for sequence, count in plan.work:
        num_tokens += count
        num_decoded += count == 1 and sequence.num_computed >= sequence.num_prompt
    return StepStats(
        steps=1,
        sequences=len(plan.work),
        prefill_tokens=num_tokens - num_decoded,
        decode_tokens=num_decoded,
        cached_tokens=plan.num_cached,
        preemptions=plan.num_preempted,
    )
