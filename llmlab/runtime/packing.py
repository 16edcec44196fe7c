"""Lay the tokens of a step's sequences end to end."""

from __future__ import annotations

import numpy as np

from llmlab.runtime.batch import StepBatch
from llmlab.runtime.request import Sequence
from llmlab.runtime.scheduler import Schedule


def pack(plan: Schedule) -> tuple[StepBatch, list[Sequence]]:
    """The plan as arrays, and the sequences that get logits, in the order of their rows."""
    sequences = [sequence for sequence, _ in plan.work]
    counts = np.array([count for _, count in plan.work], np.int32)
    starts = np.array([sequence.num_computed for sequence in sequences], np.int32)
    query_start = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    num_rows = int(query_start[-1])
    if num_rows == len(sequences):
        input_ids = np.array([sequence.tokens[sequence.num_computed] for sequence in sequences], np.int64)
        position_ids = starts.astype(np.int64)
    else:
        input_ids = np.concatenate([s.tokens[s.num_computed : s.num_computed + count] for s, count in plan.work])
        position_ids = np.arange(num_rows, dtype=np.int64) + np.repeat(starts - query_start[:-1], counts)
    # Rows whose token is the last known one of its sequence: what comes next is wanted.
    ready = [i for i, (sequence, count) in enumerate(plan.work) if sequence.num_pending == count]
    batch = StepBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        query_start=query_start,
        kv_len=starts + counts,
        block_table=np.stack([sequence.block_row for sequence in sequences]),
        logits_index=query_start[1:][ready].astype(np.int64) - 1,
        copies=tuple(plan.copies),
    )
    return batch, [sequences[i] for i in ready]
