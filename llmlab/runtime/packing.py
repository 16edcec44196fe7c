"""Lay the tokens of a step's sequences end to end, and what they ask of sampling side by side."""

from __future__ import annotations

import numpy as np

from llmlab.runtime.batch import SamplingBatch, StepBatch
from llmlab.runtime.request import Sequence
from llmlab.runtime.sampler import GREEDY_BELOW, uniform
from llmlab.runtime.scheduler import Schedule

_MOST_KEPT = 1024
_WIDE = np.arange(_MOST_KEPT)
_NARROW = _WIDE.astype(np.int32)
_WIDE.flags.writeable = _NARROW.flags.writeable = False


def pack(plan: Schedule) -> tuple[StepBatch, list[int]]:
    """The plan as arrays, and which of its sequences get logits, in the order of their rows."""
    work = plan.work
    if all(count == 1 for _, count in work) and len(work) < _MOST_KEPT:
        return _pack_single(plan)
    sequences = [sequence for sequence, _ in work]
    counts = np.array([count for _, count in work], np.int32)
    starts = np.array([sequence.num_computed for sequence in sequences], np.int32)
    query_start = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    num_rows = int(query_start[-1])
    # Rows whose token is the last one of its sequence so far: what comes next is wanted.
    ready = [i for i, (s, count) in enumerate(work) if s.num_tokens - s.num_computed == count]
    batch = StepBatch(
        input_ids=np.concatenate([s.tokens[s.num_computed : s.num_computed + count] for s, count in work]),
        position_ids=np.arange(num_rows, dtype=np.int64) + np.repeat(starts - query_start[:-1], counts),
        query_start=query_start,
        kv_len=starts + counts,
        block_table=np.concatenate([s.block_row for s in sequences]).reshape(len(sequences), -1),
        logits_index=query_start[1:][ready].astype(np.int64) - 1,
        copies=tuple(plan.copies),
    )
    return batch, ready


def _pack_single(plan: Schedule) -> tuple[StepBatch, list[int]]:
    """The same where each sequence has one token, as in most steps: few calls of NumPy, because between two steps each is slow, its
    code no longer being in the caches."""
    sequences = [sequence for sequence, _ in plan.work]
    rows = len(sequences)
    starts = [sequence.num_computed for sequence in sequences]
    ready = [i for i, s in enumerate(sequences) if s.num_tokens - starts[i] == 1]
    position_ids = np.array(starts, np.int64)
    batch = StepBatch(
        input_ids=np.array([s.tokens.item(start) for s, start in zip(sequences, starts, strict=True)], np.int64),
        position_ids=position_ids,
        query_start=_NARROW[: rows + 1],
        kv_len=(position_ids + 1).astype(np.int32),
        block_table=np.array([s.block_row for s in sequences]),
        logits_index=_WIDE[:rows] if len(ready) == rows else np.array(ready, np.int64),
        copies=tuple(plan.copies),
    )
    return batch, ready


class SamplingPacker:
    """What sequences ask of sampling, as arrays. The last step's are kept, because most steps have the same sequences."""

    def __init__(self) -> None:
        self._keep([])

    def pack(self, sequences: list[Sequence]) -> tuple[SamplingBatch, set[int]]:
        """One row a sequence, for its next token, and the rows whose token the host has to choose."""
        if sequences != self._sequences:
            self._keep(sequences)
        uniforms = np.zeros(len(sequences), np.float32)
        if self._random:
            uniforms[self._random] = [uniform(s.seed, s.num_output) for s in map(sequences.__getitem__, self._random)]
        held = {row for row in self._special if sequences[row].adjusts_logits}
        wanted = [row for row in self._special if row in held or sequences[row].params.logprobs is not None]
        return SamplingBatch(*self._arrays, uniforms, np.array(wanted, np.int32)), held

    def _keep(self, sequences: list[Sequence]) -> None:
        params = [sequence.params for sequence in sequences]
        warm = [p.temperature is not None and p.temperature >= GREEDY_BELOW for p in params]
        self._sequences = sequences
        self._random = [row for row, drawn in enumerate(warm) if drawn]
        self._special = [
            row for row, s in enumerate(sequences) if s.params.logprobs is not None or s.adjusts_logits
        ]  # whatever adjusts logits later, does so now
        self._arrays = (
            np.array([p.temperature if drawn else 0.0 for p, drawn in zip(params, warm, strict=True)], np.float32),
            np.array([min(p.top_k or 0, 2**31 - 1) for p in params], np.int32),
            np.array([1.0 if p.top_p is None else p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
        )
