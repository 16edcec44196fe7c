"""Logits of a running engine on given tokens: each is fed whatever the engine would have said (teacher forcing)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import EngineError, InputError
from llmlab.evaluate.samples import Sample
from llmlab.runtime.batch import Backend, EngineLimits, StepBatch

MAX_SEQUENCES = 8
"""Sequences in a step, at most."""
_LOGITS_LIMIT = 32 << 20
"""Numbers in a step's logits."""


@dataclass
class _Part:
    """Tokens [start, stop) of a sample, which the step feeds, and the KV slot that the sample has."""

    sample: int
    start: int
    stop: int
    slot: int


def teacher_forced(
    backend: Backend, given: Sequence[Sample], *, rows: int
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """(sample, place, logits [n, vocab]): what the engine says of n tokens in a row, those from `place` on.

    Every token from `Sample.first` on comes up once, in order; logits are valid until the next. A step takes up to `rows`
    tokens, fewer where its logits would be many; long sequences are fed in several steps, over the KV cache.
    Raises InputError for samples that the engine doesn't hold, EngineError where logits are not finite.
    """
    limits = backend.limits
    for number, sample in enumerate(given):
        if len(sample.ids) > limits.max_seq_len:
            raise InputError(f"sample {number} has {len(sample.ids)} tokens, the engine holds {limits.max_seq_len}")
        if sample.ids.max() >= limits.vocab_size:
            raise InputError(
                f"sample {number} has token {sample.ids.max()}, the engine's vocabulary is {limits.vocab_size}"
            )
    most = max(1, min(rows, limits.max_tokens_per_step, _LOGITS_LIMIT // limits.vocab_size))
    slots = min(MAX_SEQUENCES, rows, limits.num_blocks // limits.max_blocks_per_seq)
    if slots < 1:
        raise InputError(
            f"the KV pool has {limits.num_blocks} blocks, a sequence takes up to {limits.max_blocks_per_seq}"
        )
    for parts in _steps(given, most, slots):
        batch, wanted = _batch(given, parts, limits)
        logits = backend.execute(batch)[: len(batch.logits_index)]
        at = 0
        for part, count in zip(parts, wanted, strict=True):
            if count:
                here = logits[at : at + count]
                if not np.isfinite(here).all():
                    token = part.stop - count + int(np.flatnonzero(~np.isfinite(here).all(axis=1))[0])
                    raise EngineError(f"the engine's logits after token {token} of sample {part.sample} are not finite")
                yield part.sample, part.stop - count + 1, here
                at += count


def _steps(given: Sequence[Sample], most: int, slots: int) -> Iterator[list[_Part]]:
    """Samples end to end in steps of `most` tokens; one that doesn't fit goes on in the next step, in its slot."""
    parts: list[_Part] = []
    room, free = most, list(range(slots))
    for number, sample in enumerate(given):
        start, slot = 0, free.pop(0)
        while start < len(sample.ids) - 1:  # nothing is asked after the last token
            stop = min(len(sample.ids) - 1, start + room)
            parts.append(_Part(number, start, stop, slot))
            room -= stop - start
            start = stop
            done = start == len(sample.ids) - 1
            if not room or (done and not free):
                yield parts
                parts, room = [], most
                free = [s for s in range(slots) if done or s != slot]
    if parts:
        yield parts


def _batch(given: Sequence[Sample], parts: Sequence[_Part], limits: EngineLimits) -> tuple[StepBatch, list[int]]:
    """The step, and how many rows of logits each of its parts wants: always its last ones."""
    query_start = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([p.stop - p.start for p in parts], out=query_start[1:])
    wanted = [min(p.stop - p.start, max(0, p.stop - given[p.sample].first + 1)) for p in parts]
    width = limits.max_blocks_per_seq
    table = np.stack([np.arange(p.slot * width, (p.slot + 1) * width, dtype=np.int32) for p in parts])
    used = np.array([-(-p.stop // limits.block_size) for p in parts])
    batch = StepBatch(
        input_ids=np.concatenate([given[p.sample].ids[p.start : p.stop] for p in parts]),
        position_ids=np.concatenate([np.arange(p.start, p.stop, dtype=np.int64) for p in parts]),
        query_start=query_start,
        kv_len=np.array([p.stop for p in parts], np.int32),
        block_table=np.where(np.arange(width) < used[:, None], table, np.int32(-1)),
        logits_index=np.concatenate(
            [np.arange(end - count, end, dtype=np.int64) for end, count in zip(query_start[1:], wanted, strict=True)]
        ),
    )
    return batch, wanted
