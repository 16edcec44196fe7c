"""Ragged steps over a few sequences, and what transformers' cached generation says of each token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmlab.runtime.batch import StepBatch


@dataclass(frozen=True)
class Plan:
    """`chunks[b][s]`: how many tokens sequence b takes in step s; its tokens are random but fixed.

    `again` says which sequence starts like which other one: one that lost its place and is computed again.
    """

    chunks: tuple[tuple[int, ...], ...]
    seed: int = 0
    again: tuple[tuple[int, int], ...] = ()

    def tokens(self, vocab: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng(self.seed)
        tokens = [rng.integers(3, vocab, sum(c)) for c in self.chunks]
        for second, first in self.again:
            tokens[second][: len(tokens[first])] = tokens[first]
        return tokens

    @property
    def num_steps(self) -> int:
        return max(len(c) for c in self.chunks)


# Decodes, chunks and first prompts meet in most steps. A prompt of several blocks, of one token, of exactly one block
# of four, one in three chunks, and one that fills the longest sequence of 64.
RAGGED = Plan(
    (
        (9, 1, 1, 1, 1, 1),
        (1, 1, 0, 1, 1, 1),
        (0, 4, 1, 1, 0, 1),
        (0, 5, 5, 6, 1, 1),
        (0, 0, 31, 31, 1, 1),
    )
)

# A sequence decodes 27 tokens beside one-token prompts and chunks; the third loses its slot to the fourth after twelve
# tokens and comes again, in two chunks, in a slot that another one left.
PREEMPTED = Plan(
    (
        (9, *[1] * 27),
        (1, 1, 0, *[1] * 25),
        (0, 5, *[1] * 7),
        (0, *[0] * 9, 4, 4, 5, *[1] * 10),
        (0, *[0] * 9, 7, 5, *[1] * 16),
        (3, 2),
    ),
    again=((4, 2),),
)
PREEMPTED_SLOTS = [4, 1, 2, 2, 5, 5]


def batches(
    plan: Plan, vocab: int, tables: NDArray[np.int32], wanted: Callable[[int, int], NDArray[np.int64]]
) -> list[tuple[StepBatch, list[tuple[int, int]]]]:
    """The steps, each with the (sequence, token) of every row of its logits. `wanted(step, rows)` picks the rows."""
    tokens, done, result = plan.tokens(vocab), [0] * len(plan.chunks), []
    for step in range(plan.num_steps):
        counts = [(b, c[step]) for b, c in enumerate(plan.chunks) if step < len(c) and c[step]]
        rows = [(b, done[b] + i) for b, count in counts for i in range(count)]
        for b, count in counts:
            done[b] += count
        index = wanted(step, len(rows))
        batch = StepBatch(
            input_ids=np.array([tokens[b][i] for b, i in rows], np.int64),
            position_ids=np.array([i for _, i in rows], np.int64),
            query_start=np.cumsum([0, *(count for _, count in counts)]).astype(np.int32),
            kv_len=np.array([done[b] for b, _ in counts], np.int32),
            block_table=tables[[b for b, _ in counts]],
            logits_index=index,
        )
        result.append((batch, [rows[i] for i in index]))
    return result


def all_rows(step: int, rows: int) -> NDArray[np.int64]:
    return np.arange(rows)


def some_rows(step: int, rows: int) -> NDArray[np.int64]:
    """A few rows, and none at all in every third step."""
    if step % 3 == 1:
        return np.zeros(0, np.int64)
    return np.sort(np.random.default_rng(step).permutation(rows)[: max(1, rows // 2)])


def cached_generation(model: Any, plan: Plan, vocab: int) -> list[NDArray[np.float32]]:
    """Logits [tokens, vocab] of each sequence from transformers, run alone, chunk by chunk on its own KV cache."""
    import torch
    from transformers import DynamicCache

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    result = []
    for tokens, chunks in zip(plan.tokens(vocab), plan.chunks, strict=True):
        cache, at, logits = DynamicCache(config=model.config), 0, []
        for count in filter(None, chunks):
            extra = {"position_ids": torch.arange(at, at + count)[None]} if takes_positions else {}
            with torch.no_grad():
                out = model(
                    input_ids=torch.tensor(tokens[None, at : at + count]),
                    past_key_values=cache,
                    use_cache=True,
                    **extra,
                )
            logits.append(out.logits[0].numpy())
            at += count
        result.append(np.concatenate(logits))
    return result


def all_at_once(model: Any, plan: Plan, vocab: int, length: int) -> list[NDArray[np.float32]]:
    """Logits [tokens, vocab] of each sequence from transformers without a cache; tokens behind it make it `length` long."""
    import torch

    result = []
    for tokens in plan.tokens(vocab):
        ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))]])
        with torch.no_grad():
            result.append(model(input_ids=ids, use_cache=False).logits[0, : len(tokens)].numpy())
    return result


def paged_tables(plan: Plan, block_size: int, num_blocks: int, seed: int = 1) -> NDArray[np.int32]:
    """Block tables with blocks handed out in random order; unused entries are -1."""
    free = list(np.random.default_rng(seed).permutation(num_blocks))
    longest = max(-(-sum(c) // block_size) for c in plan.chunks)
    tables = np.full((len(plan.chunks), longest + 1), -1, np.int32)
    for b, chunks in enumerate(plan.chunks):
        for i in range(-(-sum(chunks) // block_size)):
            tables[b, i] = free.pop()
    return tables


def slot_tables(plan: Plan, slots: Sequence[int]) -> NDArray[np.int32]:
    return np.array([[s] for s in slots], np.int32)[: len(plan.chunks)]


def worst_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference relative to the largest expected value; infinite where a NaN came out."""
    if found.size == 0:
        return 0.0
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return error if np.isfinite(error) else float("inf")


def feeds(batch: StepBatch) -> dict[str, NDArray[Any]]:
    """A step as inputs of the serving graph."""
    names = ("input_ids", "position_ids", "query_start", "kv_len", "block_table", "logits_index")
    return {name: getattr(batch, name) for name in names}


def off_by_one_position(batch: StepBatch) -> StepBatch:
    """Decoded tokens only: all positions of a sequence shifted alike would change nothing under RoPE."""
    decoded = np.repeat(np.diff(batch.query_start) == 1, np.diff(batch.query_start)) & (batch.position_ids > 0)
    return replace(batch, position_ids=batch.position_ids - decoded)


def off_by_one_length(batch: StepBatch) -> StepBatch:
    return replace(batch, kv_len=np.maximum(batch.kv_len - 1, np.diff(batch.query_start)))


def traded_slots(batch: StepBatch) -> StepBatch:
    table = batch.block_table.copy()
    past = batch.kv_len > np.diff(batch.query_start)
    table[past] = np.roll(batch.block_table[past], 1, axis=0)
    return replace(batch, block_table=table)
