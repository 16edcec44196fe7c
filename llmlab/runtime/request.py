"""A request and the state of the sequences that it becomes."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmlab.runtime.params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what to do with it. `arrival` is in seconds of any clock; the engine only keeps it."""

    id: str
    prompt_ids: AbstractSequence[int] | NDArray[np.integer]
    params: SamplingParams = field(default_factory=SamplingParams)
    arrival: float = 0.0


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request under way: its tokens, how many of them have keys and values, and where those are.

    Of `tokens` the first `num_prompt` are the prompt's and the first `num_computed` have keys and values in `blocks`.
    A sequence is ready to sample when only its last token is computed in a step, so `num_computed` is at most
    `num_tokens - 1` between steps.
    """

    request_id: str
    index: int
    """Which of the request's n completions this is."""
    order: int
    """Place in the order of arrival; the engine serves low numbers first and preempts high ones first."""
    params: SamplingParams
    seed: int
    tokens: NDArray[np.int64]
    """[max_tokens of prompt and output together]; the tail is unset"""
    num_prompt: int
    num_tokens: int
    end_ids: frozenset[int]
    """Tokens that end this sequence."""
    leader: Sequence | None = None
    """The sibling whose keys and values of the prompt this one takes over instead of computing them."""
    status: Status = Status.WAITING
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens without keys and values yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def output_ids(self) -> NDArray[np.int64]:
        return self.tokens[self.num_prompt : self.num_tokens]

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def shares_prompt(self) -> bool:
        """Whether siblings want this sequence's keys and values, even without a prefix cache."""
        return self.params.n > 1

    def append(self, token: int) -> None:
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1


def expand(
    request: Request, prompt: NDArray[np.int64], *, max_seq_len: int, eos_token_ids: frozenset[int], order: int
) -> list[Sequence]:
    """The n sequences of a request, with orders from `order` on. `prompt` is request.prompt_ids, checked."""
    params = request.params
    seed = secrets.randbits(63) if params.seed is None else params.seed
    capacity = min(len(prompt) + params.max_tokens, max_seq_len)
    end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    sequences: list[Sequence] = []
    for index in range(params.n):
        tokens = np.empty(capacity, np.int64)
        tokens[: len(prompt)] = prompt
        sequence = Sequence(
            request_id=request.id,
            index=index,
            order=order + index,
            params=params,
            seed=seed + index,
            tokens=tokens,
            num_prompt=len(prompt),
            num_tokens=len(prompt),
            end_ids=end_ids,
            leader=sequences[0] if sequences else None,
        )
        sequences.append(sequence)
    return sequences
