"""What one step hands to a backend, and what a backend promises: the seam between policy and execution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that an engine and its KV pool fix. Lengths are in tokens."""

    vocab_size: int
    max_seq_len: int
    """Longest sequence, prompt and output together."""
    max_tokens_per_step: int
    """Most new tokens (rows of `input_ids`) that one step may carry."""
    num_blocks: int
    block_size: int
    """Tokens a KV block holds. Slots are blocks with block_size == max_seq_len."""

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_seq_len // self.block_size)


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the keys and values of the first `num_tokens` tokens of block `src` to block `dst`, in every layer."""

    src: int
    dst: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's work: T new tokens of B sequences, laid end to end without padding (the serving graph's inputs)."""

    input_ids: NDArray[np.int64]
    """[T]"""
    position_ids: NDArray[np.int64]
    """[T]"""
    query_start: NDArray[np.int32]
    """[B+1]; sequence b owns rows query_start[b]:query_start[b+1], at least one"""
    kv_len: NDArray[np.int32]
    """[B]; keys sequence b has after this step: its past plus its new tokens"""
    block_table: NDArray[np.int32]
    """[B, max_blocks]; the KV blocks of sequence b in order, unused entries are -1"""
    logits_index: NDArray[np.int64]
    """[N]; rows whose next-token logits are wanted, ascending; may be empty"""
    copies: Sequence[BlockCopy] = ()
    """done before the step"""


class Backend(Protocol):
    """Executes steps and owns the KV pool's memory. It knows nothing of requests."""

    limits: EngineLimits

    def execute(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run one step and return logits [N, vocab], valid until the next call."""
        ...

    def release(self, blocks: Sequence[int]) -> None:
        """The contents of `blocks` are dead; their memory may go back to the operating system."""
        ...

    def close(self) -> None: ...
