"""What an engine core did, step by step, as plain data: recorded while it runs, to be drawn, kept and replayed.

    with record(llm.core) as trace:
        llm.generate(prompts)
    trace.save("trace.json")

A core that nobody records pays nothing for this but one comparison a step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmlab.errors import InputError
from llmlab.files import read_json, write_text
from llmlab.runtime.blocks import IntegrityError
from llmlab.runtime.request import Sequence, Status

if TYPE_CHECKING:
    from llmlab.runtime.core import EngineCore
    from llmlab.runtime.inflight import Flight

FORMAT = 1
"""Version of the file that `Trace.save` writes."""

State = Literal["waiting", "prefill", "decode", "held", "preempted", "ended"]
"""What a step was for a sequence. held: it has its blocks, and no token of this step was left for it. ended: it ended without
taking part."""


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """One sequence in one step."""

    name: str
    """The request's id, with the number of the completion where there are several."""
    state: State
    start: int
    """Tokens that had keys and values before the step."""
    count: int
    """Tokens that the step computed for it."""
    cached: int
    """Of `start`, those that came from other sequences' blocks when it was admitted in this step."""
    num_prompt: int
    num_tokens: int
    """Prompt and output after the step."""
    blocks: tuple[int, ...]
    """Its KV blocks after the step, in order; none when it has ended."""
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One KV block after a step."""

    owners: tuple[str, ...]
    """Names of the sequences that hold it; more than one: a prefix that they share."""
    references: int
    """How many owners the block manager counts."""
    cached: bool
    """Nobody's, and kept for prompts that begin alike."""
    filled: int
    """Tokens whose keys and values it holds."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of an engine core."""

    sequences: tuple[SequenceRecord, ...]
    """In order of arrival; those that were unfinished before the step or came since."""
    blocks: tuple[BlockRecord, ...]
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    seconds: float
    integrity: str
    """What is wrong with the books; empty where they balance."""

    @property
    def num_running(self) -> int:
        """Sequences that the step worked on."""
        return sum(s.count > 0 for s in self.sequences)

    @property
    def shared_blocks(self) -> int:
        return sum(len(block.owners) > 1 for block in self.blocks)


@dataclass
class Trace:
    """All steps that were recorded, and the sizes that they ran with."""

    max_num_seqs: int
    max_tokens_per_step: int
    num_blocks: int
    block_size: int
    prefix_cache: bool
    batching: str
    steps: list[StepRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trace:
        """What `to_dict` gave. Raises InputError for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"not a trace of format {FORMAT}: give what Trace.save wrote")
        try:
            values = {key: value for key, value in data.items() if key != "format"}
            return cls(**{**values, "steps": [_step(step) for step in values["steps"]]})
        except (KeyError, TypeError) as error:
            raise InputError(f"a damaged trace: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> Path:
        write_text(Path(path), json.dumps(self.to_dict(), ensure_ascii=False))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        return cls.from_dict(read_json(Path(path), InputError))

    def __str__(self) -> str:
        tokens = sum(s.prefill_tokens + s.decode_tokens for s in self.steps)
        return f"{len(self.steps)} steps, {tokens} tokens, {sum(s.preemptions for s in self.steps)} preemptions"


class Recorder:
    """Writes down each step of `core` into `trace` until `close`. Raises InputError if another recorder does already."""

    def __init__(self, core: EngineCore) -> None:
        if core.observer is not None:
            raise InputError("this engine core is being recorded already: close the other recorder first")
        scheduler, blocks = core.scheduler, core.blocks
        self.trace = Trace(
            max_num_seqs=scheduler.max_num_seqs,
            max_tokens_per_step=scheduler.max_tokens_per_step,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            prefix_cache=blocks.prefix_cache,
            batching=scheduler.batching,
        )
        self._core = core
        self._before: dict[Sequence, bool] = {}  # unfinished sequences, and whether they were running
        self._over: set[int] = set()  # those whose end was told; a step in flight may still have a row for them
        core.observer = self._note

    def close(self) -> None:
        if self._core.observer == self._note:
            self._core.observer = None

    def _note(self, flight: Flight | None) -> None:
        core, stats = self._core, self._core.stats.last
        live = [*core.scheduler.waiting, *core.scheduler.running]
        rows = [] if flight is None else list(zip(flight.work, flight.ends, strict=True))
        spans = {sequence: (end - count, count) for (sequence, count), end in rows}
        ended = [s for s in {**self._before, **spans} if s.finished and s.order not in self._over]
        self._over.update(s.order for s in ended)
        records = [self._sequence(s, spans.get(s)) for s in sorted({*live, *ended}, key=lambda s: s.order)]
        self.trace.steps.append(
            StepRecord(
                sequences=tuple(records),
                blocks=self._blocks(live),
                prefill_tokens=stats.prefill_tokens,
                decode_tokens=stats.decode_tokens,
                cached_tokens=stats.cached_tokens,
                preemptions=stats.preemptions,
                seconds=stats.step_s,
                integrity=_integrity(core),
            )
        )
        self._before = {s: s.status is Status.RUNNING for s in live}

    def _sequence(self, sequence: Sequence, span: tuple[int, int] | None) -> SequenceRecord:
        ran = self._before.get(sequence, False)
        start, count = span or (sequence.num_stored, 0)
        return SequenceRecord(
            name=_name(sequence),
            state=_state(sequence, span, ran),
            start=start,
            count=count,
            cached=start if count and not ran else 0,
            num_prompt=sequence.num_prompt,
            num_tokens=sequence.num_tokens,
            blocks=tuple(sequence.blocks),
            finish_reason=sequence.finish_reason,
        )

    def _blocks(self, live: list[Sequence]) -> tuple[BlockRecord, ...]:
        size = self.trace.block_size
        owners: dict[int, list[str]] = {}
        stored: Counter[int] = Counter()
        for sequence in live:
            for place, block in enumerate(sequence.blocks):
                owners.setdefault(block, []).append(_name(sequence))
                stored[block] = max(stored[block], min(size, sequence.num_stored - place * size), 0)
        return tuple(
            BlockRecord(tuple(owners.get(block, ())), references, cached, max(filled, stored[block]))
            for block, (references, cached, filled) in enumerate(self._core.blocks.states())
        )


@contextmanager
def record(core: EngineCore) -> Iterator[Trace]:
    """Record the steps that `core` does inside of a with statement."""
    recorder = Recorder(core)
    try:
        yield recorder.trace
    finally:
        recorder.close()


def _name(sequence: Sequence) -> str:
    return sequence.request_id if len(sequence.siblings) == 1 else f"{sequence.request_id}.{sequence.index}"


def _state(sequence: Sequence, span: tuple[int, int] | None, ran: bool) -> State:
    if span is not None:
        start, count = span
        return "decode" if count == 1 and start >= sequence.num_prompt else "prefill"
    if sequence.status is Status.FINISHED:
        return "ended"
    if sequence.status is Status.RUNNING:
        return "held"
    return "preempted" if ran else "waiting"


def _integrity(core: EngineCore) -> str:
    try:
        core.check_integrity()
    except IntegrityError as error:
        return str(error)
    return ""


def _step(data: dict[str, Any]) -> StepRecord:
    sequences = tuple(SequenceRecord(**{**s, "blocks": tuple(s["blocks"])}) for s in data["sequences"])
    blocks = tuple(BlockRecord(**{**b, "owners": tuple(b["owners"])}) for b in data["blocks"])
    return StepRecord(**{**data, "sequences": sequences, "blocks": blocks})
