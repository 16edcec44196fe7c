"""A request and the state of the sequences that it becomes."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError
from llmlab.runtime.batch import EngineLimits
from llmlab.runtime.params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, eq=False)
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

    Of `tokens` the first `num_prompt` are the prompt's and the first `num_computed` have keys and values in `blocks`,
    those that steps in flight are about to write included. What comes next is sampled in the step that computes the
    last token. While that step is in flight, the sequence either has nothing to compute, or goes on with a token that
    only the device knows: the last of `tokens` is then negative (see StepBatch.input_ids).
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
    block_row: NDArray[np.int32]
    """[max_blocks]; `blocks` as the backend wants them, the rest is -1"""
    siblings: list[Sequence]
    """All n sequences of the request."""
    status: Status = Status.WAITING
    num_computed: int = 0
    num_stored: int = 0
    """Those of num_computed whose steps are over."""
    in_flight: int = 0
    """Steps in flight that this sequence takes part in."""
    trusted: bool = True
    """Whether what its blocks hold can be used again once it has ended."""
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
    def waits_for_sibling(self) -> bool:
        """Whether a sibling is computing the prompt's keys and values, which this sequence can then use as well."""
        return len(self.siblings) > 1 and any(
            s.status is Status.RUNNING and s.num_stored < s.num_prompt - 1 for s in self.siblings
        )

    def set_blocks(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.block_row.fill(-1)
        self.block_row[: len(blocks)] = blocks

    def add_block(self, block: int) -> None:
        self.block_row[len(self.blocks)] = block
        self.blocks.append(block)

    @property
    def adjusts_logits(self) -> bool:
        """Whether the next token is chosen from anything but the model's own logits."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or bool(params.logit_bias)
            or self.num_output < params.min_tokens
        )

    def append(self, token: int) -> None:
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1

    def learn(self, position: int, token: int) -> None:
        """Token `position` has been chosen; the sequence may have gone on with it already."""
        self.tokens[position] = token
        if self.num_tokens == position:
            self.num_tokens += 1


def checked_prompt(request: Request, limits: EngineLimits) -> NDArray[np.int64]:
    """The request's prompt as an array, when it and the parameters fit an engine. Raises InputError."""
    params = request.params
    if len(request.prompt_ids) == 0:
        raise InputError("the prompt is empty, expected at least one token")
    try:
        prompt = np.asarray(request.prompt_ids)
    except (ValueError, OverflowError):  # ragged
        prompt = np.empty((0, 0))
    if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
        raise InputError("the prompt holds something that isn't an integer, expected a list of token ids")
    outside = prompt[(prompt < 0) | (prompt >= limits.vocab_size)]
    if len(outside):
        raise InputError(f"the prompt holds token id {outside[0]}, expected ids from 0 to {limits.vocab_size - 1}")
    longest = min(limits.max_seq_len - 1, limits.num_blocks * limits.block_size)
    if len(prompt) > longest:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, expected at most {longest}, which is what this engine holds beside "
            "one token of output; shorten it or build the engine with a larger max_seq_len"
        )
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias or ())):
        for token in ids:
            if token >= limits.vocab_size:
                raise InputError(f"{name} holds token id {token}, expected ids from 0 to {limits.vocab_size - 1}")
    if params.logprobs is not None and params.logprobs > limits.vocab_size:
        raise InputError(f"logprobs is {params.logprobs}, expected at most the {limits.vocab_size} tokens there are")
    return prompt.astype(np.int64)


def expand(
    request: Request, prompt: NDArray[np.int64], *, limits: EngineLimits, eos_token_ids: frozenset[int], order: int
) -> list[Sequence]:
    """The n sequences of a request, with orders from `order` on. `prompt` is request.prompt_ids, checked."""
    params = request.params
    seed = secrets.randbits(63) if params.seed is None else params.seed
    capacity = min(len(prompt) + params.max_tokens, limits.max_seq_len)
    end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    siblings: list[Sequence] = []
    for index in range(params.n):
        tokens = np.empty(capacity, np.int64)
        tokens[: len(prompt)] = prompt
        siblings.append(
            Sequence(
                request_id=request.id,
                index=index,
                order=order + index,
                params=params,
                seed=seed + index,
                tokens=tokens,
                num_prompt=len(prompt),
                num_tokens=len(prompt),
                end_ids=end_ids,
                block_row=np.full(limits.max_blocks_per_seq, -1, np.int32),
                siblings=siblings,
            )
        )
    return siblings
