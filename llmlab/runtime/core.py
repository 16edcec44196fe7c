"""The engine's inner loop: requests in, tokens out, step by step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from llmlab.errors import EngineError, InputError
from llmlab.runtime.batch import Backend
from llmlab.runtime.blocks import BlockManager, IntegrityError
from llmlab.runtime.inflight import Flight, Pipeline
from llmlab.runtime.params import checked_integer
from llmlab.runtime.request import FinishReason, Request, Sequence, Status, checked_prompt, expand
from llmlab.runtime.sampler import Sample, TokenLogprobs
from llmlab.runtime.scheduler import Batching, Scheduler
from llmlab.runtime.stats import CoreStats, StepStats

NOT_FINITE = "the model returned logits without a finite largest value; its weights or their precision are at fault"


@dataclass(slots=True)
class SequenceUpdate:
    """What a step brought to one sequence. The token that ends an output (end of sequence, stop id) is part of it."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One for each of token_ids, when the request asked for them."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """One line, when finish_reason is "error"."""


class EngineCore:
    """Requests on one backend, batched in flight. Not thread-safe: one thread calls, cancel() included.

    max_num_seqs: most sequences in a step. max_tokens_per_step: most new tokens in a step; longer prompts are split.
    prefix_cache: keep the keys and values of ended sequences for prompts that begin alike. batching: see Scheduler.
    Raises InputError for sizes that the backend's limits don't allow.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_num_seqs: int,
        max_tokens_per_step: int,
        eos_token_ids: tuple[int, ...] = (),
        prefix_cache: bool = False,
        batching: Batching = "inflight",
    ) -> None:
        limits = backend.limits
        max_num_seqs = checked_integer("max_num_seqs", max_num_seqs, low=1)
        max_tokens_per_step = checked_integer("max_tokens_per_step", max_tokens_per_step, low=1)
        if not max_num_seqs <= max_tokens_per_step <= limits.max_tokens_per_step:
            raise InputError(
                f"max_tokens_per_step is {max_tokens_per_step}, expected at least max_num_seqs ({max_num_seqs}) "
                f"and at most the engine's limit of {limits.max_tokens_per_step}"
            )
        if batching not in ("inflight", "static"):
            raise InputError(f"batching is {batching!r}, expected 'inflight' or 'static'")
        self.backend = backend
        self.stats = CoreStats()
        self._limits = limits
        self._eos_token_ids = frozenset(token for token in eos_token_ids if token < limits.vocab_size)
        self._blocks = BlockManager(limits.num_blocks, limits.block_size, prefix_cache=prefix_cache)
        self._room = limits.num_blocks * limits.block_size
        self._scheduler = Scheduler(
            self._blocks, max_num_seqs=max_num_seqs, max_tokens_per_step=max_tokens_per_step, batching=batching
        )
        self._pipeline = Pipeline(backend)
        self._live: dict[str, list[Sequence]] = {}
        self._cancelled: list[SequenceUpdate] = []
        self._num_sequences = 0
        self.observer: Callable[[Flight | None], None] | None = None
        """Called at the end of each step with the one that landed, if any: see runtime/trace.py."""

    @property
    def has_work(self) -> bool:
        """Whether step() has something to compute or to tell."""
        return bool(self._live or self._cancelled or self._pipeline.flights)

    @property
    def scheduler(self) -> Scheduler:
        """The policy with its queues, to be looked at."""
        return self._scheduler

    @property
    def blocks(self) -> BlockManager:
        """The books of the KV pool, to be looked at."""
        return self._blocks

    def add(self, request: Request) -> None:
        """Queue a request. Raises InputError, and changes nothing, when it can't be served."""
        if request.id in self._live or any(update.request_id == request.id for update in self._cancelled):
            raise InputError(f"request id {request.id!r} is in use, expected one that no unfinished request has")
        prompt = checked_prompt(request, self._limits)
        sequences = expand(
            request, prompt, limits=self._limits, eos_token_ids=self._eos_token_ids, order=self._num_sequences
        )
        self._num_sequences += len(sequences)
        self._live[request.id] = sequences
        self._scheduler.add(sequences)

    def cancel(self, request_id: str) -> None:
        """End a request now. The next step() tells "cancelled" of its unfinished sequences; unknown ids do nothing."""
        for sequence in self._live.get(request_id, []):
            if not sequence.finished:
                self._end(sequence, "cancelled")
                self._cancelled.append(SequenceUpdate(request_id, sequence.index, [], finish_reason="cancelled"))
        self._release()

    def finish(self, request_id: str, index: int, reason: FinishReason) -> None:
        """End one sequence because of something that the caller saw, such as a stop string. No update follows."""
        for sequence in self._live.get(request_id, []):
            if sequence.index == index and not sequence.finished:
                self._end(sequence, reason)
        self._release()

    def step(self) -> list[SequenceUpdate]:
        """Hand steps to the backend as far as they are known, and take in what the oldest one brought.

        One update for every sequence that got a token or ended. A backend's error ends the sequences of its step, as
        updates. Only an interruption (Ctrl-C) comes out of here; what was being executed or handed over is then
        computed again, and what was being waited for isn't lost.
        """
        started = time.perf_counter()
        flight, stats, updates = None, None, []
        while self._pipeline.has_room:
            plan = self._scheduler.schedule(ahead=bool(self._pipeline.flights))
            self._release()
            if not plan.work:
                break
            self._pipeline.launch(plan)
        if self._pipeline.flights:
            flight, samples = self._pipeline.land()
            stats, updates = flight.stats, self._take_in(flight, samples)
            self._release()
        told, self._cancelled = self._cancelled, []
        stats = stats or StepStats()
        stats.step_s = time.perf_counter() - started
        self.stats.note(stats)
        if self.observer is not None:
            self.observer(flight)
        return told + updates

    def waiting_requests(self) -> set[str]:
        """Ids of requests whose first sequence holds no place in the next step: not started yet, or preempted."""
        return {sequence.request_id for sequence in self._scheduler.waiting if sequence.index == 0}

    def check_integrity(self) -> None:
        """Raises IntegrityError when a sequence or a block is lost, held twice or held by nobody."""
        self._scheduler.check_integrity()
        queued = [*self._scheduler.waiting, *self._scheduler.running]
        live = [s for sequences in self._live.values() for s in sequences if not s.finished]
        if {id(s) for s in queued} != {id(s) for s in live} or len(queued) != len(live):
            raise IntegrityError(f"{len(live)} sequences are unfinished and {len(queued)} are scheduled")
        in_flight = Counter(sequence for flight in self._pipeline.flights for sequence, _ in flight.work)
        known = {sequence: sequence.in_flight for sequence in [*queued, *self._scheduler.leaving] if sequence.in_flight}
        if in_flight != known:
            raise IntegrityError(f"{len(in_flight)} sequences are in flight and {len(known)} know it")

    def _take_in(self, flight: Flight, samples: list[Sample] | EngineError) -> list[SequenceUpdate]:
        """Do to the sequences what a step did that is over."""
        works = not flight.void and not isinstance(samples, EngineError)
        flight.stats.dropped_tokens = self._scheduler.settle(flight.work, trusted=works)
        if flight.void:
            self._start_over(flight)
            return []
        if isinstance(samples, EngineError):
            return self._fail(flight, str(samples))
        self._record(flight)
        return self._append(flight, samples)

    def _record(self, flight: Flight) -> None:
        for (sequence, count), end in zip(flight.work, flight.ends, strict=True):
            if self._scheduler.shares_blocks(sequence) and not sequence.finished:
                self._blocks.record(sequence.blocks, sequence.tokens[:end], end - count)

    def _append(self, flight: Flight, samples: list[Sample]) -> list[SequenceUpdate]:
        updates = []
        for row, sample in zip(flight.ready, samples, strict=True):
            sequence, end = flight.work[row].sequence, flight.ends[row]
            if sequence.status is Status.FINISHED:
                continue
            token, logprobs = sample
            token_ids: list[int] = []
            reason: FinishReason | None = "error"
            error: str | None = NOT_FINITE
            if token is not None:
                token_ids = [token]
                sequence.learn(end, token)
                reason, error = self._verdict(sequence, token, end + 1)
            if reason is not None:
                self._end(sequence, reason, trusted=token is not None)
            told = None if logprobs is None else [logprobs]
            updates.append(SequenceUpdate(sequence.request_id, sequence.index, token_ids, told, reason, error))
        return updates

    def _verdict(self, sequence: Sequence, token: int, num_tokens: int) -> tuple[FinishReason | None, str | None]:
        """Whether the sequence ends with this token, its `num_tokens`-th, and the error if it is one."""
        if token in sequence.end_ids:
            return "stop", None
        if num_tokens == len(sequence.tokens):
            return "length", None
        if num_tokens > self._room:
            return "error", f"the sequence fills the whole KV pool of {self._room} tokens; lower max_tokens"
        return None, None

    def _fail(self, flight: Flight, text: str) -> list[SequenceUpdate]:
        """End the sequences of a step that the backend couldn't do; what their blocks hold is unknown."""
        updates = []
        for sequence, _ in flight.work:
            if not sequence.finished:
                self._end(sequence, "error", trusted=False)
                updates.append(
                    SequenceUpdate(sequence.request_id, sequence.index, [], finish_reason="error", error=text)
                )
        return updates

    def _start_over(self, flight: Flight) -> None:
        """Compute the sequences of a step again whose outcome is unknown or doesn't count."""
        for row, (sequence, _) in enumerate(flight.work):
            if not sequence.finished:
                if row in flight.ready:
                    sequence.num_tokens = flight.ends[row]
                self._scheduler.preempt(sequence, keep_blocks=False)

    def _end(self, sequence: Sequence, reason: FinishReason, *, trusted: bool = True) -> None:
        sequence.finish_reason = reason
        self._scheduler.remove(sequence, keep_blocks=trusted)
        if all(s.finished for s in sequence.siblings):
            del self._live[sequence.request_id]

    def _release(self) -> None:
        dead = self._blocks.drain_dead()
        if dead:
            self.backend.release(dead)
