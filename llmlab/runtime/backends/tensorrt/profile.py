"""Where the time of a step goes, by CUDA events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmlab.cuda import Event, Stream
from llmlab.errors import InputError
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.backends.tensorrt.executor import Executor
from llmlab.runtime.batch import EngineLimits, StepBatch
from llmlab.runtime.program import Attend, Multiply, Normalize, RunPlan

_KINDS = {RunPlan: "part", Attend: "attention", Multiply: "product", Normalize: "norm"}


@dataclass(frozen=True)
class StepTime:
    """The median milliseconds of one step of the program, on the GPU."""

    name: str
    kind: str
    """`part`, `attention`, `product` or `norm`."""
    ms: float


@dataclass(frozen=True)
class StepProfile:
    """A step's time, part by part. Launched one by one they leave gaps on the GPU, so their sum is above `step_ms`."""

    shape: StepShape
    step_ms: float
    """Of the whole step as it runs otherwise: a decode step as one CUDA graph."""
    eager_ms: float
    steps: tuple[StepTime, ...]

    def total(self, kind: str) -> float:
        return sum(step.ms for step in self.steps if step.kind == kind)


def decode_batch(limits: EngineLimits, sequences: int, context: int) -> StepBatch:
    """A decode step of `sequences` that have `context` tokens each, the new one included, in blocks of their own."""
    blocks = -(-context // limits.block_size)
    if not 1 <= context <= limits.max_seq_len or sequences < 1 or sequences * blocks > limits.num_blocks:
        raise InputError(
            f"{sequences} sequences of {context} tokens don't fit into {limits.num_blocks} KV blocks of {limits.block_size} "
            f"tokens and sequences of up to {limits.max_seq_len}"
        )
    table = np.full((sequences, limits.max_blocks_per_seq), -1, np.int32)
    table[:, :blocks] = np.arange(sequences * blocks).reshape(sequences, blocks)
    return StepBatch(
        input_ids=np.arange(sequences, dtype=np.int64) % limits.vocab_size,
        position_ids=np.full(sequences, context - 1, np.int64),
        query_start=np.arange(sequences + 1, dtype=np.int32),
        kv_len=np.full(sequences, context, np.int32),
        block_table=table,
        logits_index=np.arange(sequences, dtype=np.int64),
    )


def measure(executor: Executor, shape: StepShape, stream: Stream, repeats: int) -> StepProfile:
    """Run a step, whose integers are in place, again and again: launched one by one, then as it runs otherwise."""
    steps = executor.program.steps
    events = [Event() for _ in range(len(steps) + 1)]
    times = np.empty((repeats, len(steps)))
    eager = np.empty(repeats)
    for run in range(repeats):
        events[0].record(stream)
        executor.enqueue(shape, after=lambda at: events[at + 1].record(stream))
        stream.synchronize()
        times[run] = [events[at + 1].elapsed_ms(events[at]) for at in range(len(steps))]
        eager[run] = events[-1].elapsed_ms(events[0])
    executor.run(shape)  # captured by now
    whole = np.empty(repeats)
    for run in range(repeats):
        events[0].record(stream)
        executor.run(shape)
        events[1].record(stream)
        stream.synchronize()
        whole[run] = events[1].elapsed_ms(events[0])
    kinds = (_KINDS[type(step)] for step in steps)
    medians = np.median(times, axis=0)
    found = (StepTime(s.name, kind, float(ms)) for s, kind, ms in zip(steps, kinds, medians, strict=True))
    return StepProfile(shape, float(np.median(whole)), float(np.median(eager)), tuple(found))
