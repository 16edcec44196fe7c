"""What one step hands to a backend, and what a backend promises: the seam between policy and execution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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
    """[T]; in a submitted step -1-j stands for the token that the step submitted before sampled in its row j of N"""
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


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the device chooses a token for each of a step's N rows of logits: `SamplingParams` as arrays, all [N].

    `runtime.sampler.draw` says what they mean.
    """

    temperature: NDArray[np.float32]
    """0 is greedy; the others don't matter then"""
    top_k: NDArray[np.int32]
    """0 is off"""
    top_p: NDArray[np.float32]
    """1 is off"""
    min_p: NDArray[np.float32]
    """0 is off"""
    uniform: NDArray[np.float32]
    """in [0, 1), what decides the token"""
    host_rows: NDArray[np.int32]
    """[M]; rows of the N whose logits the host wants as well, ascending; mostly empty"""


class StepResult(NamedTuple):
    """What a step sampled."""

    token_ids: NDArray[np.int32]
    """[N]; -1 where the logits hold no finite largest value"""
    logits: NDArray[np.float32]
    """[M, vocab]; those of `SamplingBatch.host_rows`"""


class Pending(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait until the step is over. What it returns is valid until the next `submit`.

        Raises what went wrong in the step, in each call; a GPU that is lost must raise too, not hang. Ctrl-C may come
        out of here: the step goes on, and the next call waits again.
        """
        ...


@runtime_checkable
class Pipelined(Protocol):
    """A Backend that can also run steps behind the caller's back and choose tokens itself.

    Steps run one after the other in the order of `submit`, so that each sees all keys and values of those before it;
    `release` takes effect in that order too, and `close` waits for what was submitted. At most two steps are submitted
    and not over: a third comes when the older one's `result` has returned or raised.
    """

    def submit(self, batch: StepBatch, sampling: SamplingBatch) -> Pending:
        """Begin a step as soon as those submitted before are over, and return at once.

        The arrays belong to the caller again when this returns. Where `input_ids` names a row of the step before whose
        token is -1, any valid token will do: what comes of it is dropped. A step that raised here isn't referred to.
        """
        ...
