"""A backend without a model: logits are a hash of every key that a row reads through its block table.

A stored key mixes its token, its position and all keys before it, as a deep transformer's keys do. So a wrong, stale,
missing or foreign key, a wrong position or a wrong length changes every later logit of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmlab.runtime.batch import EngineLimits, StepBatch

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x):
    """The finalizer of splitmix64, for Python integers below 2**64 and for uint64 arrays."""
    if isinstance(x, int):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(token: int, position: int, before: int) -> int:
    return mix((mix((token + 1) * GOLDEN + position & MASK) + before) & MASK)


def attend(keys: np.ndarray) -> int:
    """One number of all keys [n] and their order."""
    return int(mix(keys + np.arange(1, len(keys) + 1, dtype=np.uint64) * np.uint64(GOLDEN)).sum())


def logits_of(state: int, vocab_size: int) -> np.ndarray:
    bits = mix(np.uint64(state) + np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return ((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)) * np.float32(8)


def true_logits(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """Logits [vocab] after `tokens`, without any pool: the oracle."""
    keys = np.empty(len(tokens), np.uint64)
    for position, token in enumerate(tokens):
        keys[position] = key_of(int(token), position, attend(keys[:position]))
    return logits_of(attend(keys), vocab_size)


class ToyBackend:
    """Holds the pool and runs steps; checks that every batch keeps the contract of StepBatch.

    fail_at, interrupt_at: steps, counted from 1, in which an error or Ctrl-C comes when they are half done.
    """

    def __init__(
        self,
        *,
        block_size=4,
        num_blocks=64,
        max_seq_len=64,
        vocab_size=32,
        max_tokens_per_step=64,
        fail_at=(),
        interrupt_at=(),
    ):
        self.limits = EngineLimits(
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            max_tokens_per_step=max_tokens_per_step,
            num_blocks=num_blocks,
            block_size=block_size,
        )
        self.pool = np.full((num_blocks, block_size), 0xDEAD, np.uint64)
        self.steps = 0
        self.tokens = 0
        self.copied = 0
        self.released: list[int] = []
        self.fail_at = set(fail_at)
        self.interrupt_at = set(interrupt_at)

    def execute(self, batch: StepBatch) -> np.ndarray:
        self.check(batch)
        self.steps += 1
        self.tokens += len(batch.input_ids)
        for copy in batch.copies:
            self.copy(copy)
        if self.steps in self.fail_at | self.interrupt_at:
            for row, start in zip(batch.block_table, batch.kv_len - np.diff(batch.query_start), strict=True):
                written = row[start // self.limits.block_size :]
                self.pool[written[written >= 0]] = 0xBAD  # nobody knows what is there now
            if self.steps in self.interrupt_at:
                raise KeyboardInterrupt
            raise RuntimeError("the toy\nbroke")
        states = np.zeros(len(batch.input_ids), object)
        for b in range(len(batch.kv_len)):
            self.run_row(batch, b, states)
        rows = [logits_of(states[row], self.limits.vocab_size) for row in batch.logits_index]
        return np.array(rows, np.float32).reshape(len(rows), self.limits.vocab_size)

    def run_row(self, batch: StepBatch, b: int, states: np.ndarray) -> None:
        first, last = int(batch.query_start[b]), int(batch.query_start[b + 1])
        length = int(batch.kv_len[b])
        blocks = batch.block_table[b]
        for row in range(first, last):
            at = length - (last - row)
            block, offset = blocks[at // self.limits.block_size], at % self.limits.block_size
            before = attend(self.read(blocks, at))
            self.pool[block, offset] = key_of(int(batch.input_ids[row]), int(batch.position_ids[row]), before)
            states[row] = attend(self.read(blocks, at + 1))

    def read(self, blocks: np.ndarray, length: int) -> np.ndarray:
        return self.pool[blocks[: -(-length // self.limits.block_size)]].reshape(-1)[:length]

    def copy(self, copy) -> None:
        self.pool[copy.dst, : copy.num_tokens] = self.pool[copy.src, : copy.num_tokens]
        self.copied += copy.num_tokens

    def release(self, blocks: Sequence[int]) -> None:
        assert len(set(blocks)) == len(blocks)
        self.pool[list(blocks)] = 0xF4EE
        self.released += blocks

    def close(self) -> None: ...

    def check(self, batch: StepBatch) -> None:
        limits, counts = self.limits, np.diff(batch.query_start)
        assert batch.input_ids.dtype == batch.position_ids.dtype == batch.logits_index.dtype == np.int64
        assert batch.query_start.dtype == batch.kv_len.dtype == batch.block_table.dtype == np.int32
        assert batch.query_start[0] == 0 and batch.query_start[-1] == len(batch.input_ids) == len(batch.position_ids)
        assert (counts > 0).all() and len(batch.input_ids) <= limits.max_tokens_per_step
        assert batch.block_table.shape == (len(counts), limits.max_blocks_per_seq)
        assert ((batch.input_ids >= 0) & (batch.input_ids < limits.vocab_size)).all()
        written: set[int] = set()
        for b, row in enumerate(batch.block_table):
            start, end = int(batch.kv_len[b] - counts[b]), int(batch.kv_len[b])
            positions = batch.position_ids[batch.query_start[b] : batch.query_start[b + 1]]
            assert positions.tolist() == list(range(start, end))
            used = int((row >= 0).sum())
            assert (row[:used] >= 0).all() and (row[used:] == -1).all() and (row < limits.num_blocks).all()
            assert used >= -(-end // limits.block_size) and len(set(row[:used].tolist())) == used
            mine = set(row[start // limits.block_size : used].tolist())
            assert not mine & written, "two sequences write the same block"
            written |= mine
        for b, row in enumerate(batch.block_table):
            shared = row[: int(batch.kv_len[b] - counts[b]) // limits.block_size]
            assert not set(shared.tolist()) & written, "a block is read by one sequence and written by another"
