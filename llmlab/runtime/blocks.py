"""Who owns which block of the KV pool, and which blocks hold keys and values that can be used again.

A block is in exactly one of these states:

| state  | references | contents                          | where it is kept                  |
|--------|------------|-----------------------------------|-----------------------------------|
| free   | 0          | dead                              | `_free`, a heap: lowest id first  |
| cached | 0          | keys and values of known tokens   | `_cached`, least recently used first |
| used   | >= 1       | written by its sequences          | in their `blocks`                 |

Only full blocks are shared, and full blocks are never written, so no one sees another's tokens. The last, partial block
of a matching prefix is copied, or taken over where it lies when nobody needs it any more. With slots (one block a
sequence) every match is such a partial one; no code here knows which layout it serves.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmlab.runtime.batch import BlockCopy

ROOT = b""
"""Stands for the tokens before a sequence's first block."""


class IntegrityError(RuntimeError):
    """The books of the block manager don't balance: a bug, never caused by a user."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What `allocate` needs to give a sequence its blocks; valid until the manager changes."""

    shared: tuple[int, ...]
    """Full blocks that already hold the sequence's first tokens."""
    source: int | None
    """Block whose first `source_tokens` tokens are the next ones of the sequence."""
    source_tokens: int
    take_over: bool
    """The source becomes the sequence's own instead of being copied."""
    num_new: int
    """Blocks with nothing in them yet, the copy's target among them."""
    num_cached: int
    """Tokens that need no computing."""


class BlockManager:
    """Hands out the blocks of a pool of `num_blocks` blocks of `block_size` tokens.

    With `prefix_cache` the blocks of ended sequences stay cached until the room is needed. Without it they are dead
    when the sequence ends, and `drain_dead` reports them. Allocation has two phases: `can_allocate` asks and changes
    nothing, `allocate` commits.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = False) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._free = list(range(num_blocks))
        self._references = [0] * num_blocks
        self._cached: dict[int, None] = {}
        self._dead: set[int] = set()
        # What blocks hold, for blocks whose tokens were recorded; the first _filled[b] entries of a row are valid.
        self._tokens = np.zeros((num_blocks, block_size), np.int32)
        self._filled = [0] * num_blocks
        self._parent: list[bytes | None] = [None] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, None]] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be had, free or cached."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, tokens: NDArray[np.int64], *, reuse: bool, spare: int = 0) -> Allocation | None:
        """Room for the keys and values of all `tokens` with `spare` blocks left over, or None.

        With `reuse`, known prefixes are looked for; at least one token is always left to compute, to have logits of it.
        """
        shared, source, source_tokens = self._match(tokens[: len(tokens) - 1]) if reuse else ((), None, 0)
        # A partial block that nobody uses is taken over when nothing is lost by it, or when there is nothing else.
        take_over = (
            source is not None
            and self._references[source] == 0
            and (source_tokens == self._filled[source] or not self._free)
        )
        num_new = self.blocks_for(len(tokens)) - len(shared) - take_over
        reserved = sum(self._references[block] == 0 for block in shared) + take_over
        if num_new + spare > self.num_available - reserved:
            return None
        num_cached = len(shared) * self.block_size + source_tokens
        return Allocation(shared, source, source_tokens, take_over, num_new, num_cached)

    def allocate(self, allocation: Allocation) -> tuple[list[int], list[BlockCopy]]:
        """Commit: the sequence's blocks in order, and the copy to do before its first step."""
        for block in allocation.shared:
            self._acquire(block)
        blocks, copies, source = list(allocation.shared), [], allocation.source
        if source is not None and allocation.take_over:
            self._acquire(source)
            self._truncate(source, allocation.source_tokens)
            blocks.append(source)
        elif source in self._cached:
            self._cached[source] = self._cached.pop(source)  # recently used
        # The copy's target comes first, while there are free blocks, so it is never the evicted source itself.
        blocks += [self._take() for _ in range(allocation.num_new)]
        if source is not None and not allocation.take_over:
            copies.append(BlockCopy(source, blocks[len(allocation.shared)], allocation.source_tokens))
        return blocks, copies

    def allocate_one(self) -> int:
        """One more block for a sequence that grows; asks for num_available >= 1."""
        return self._take()

    def record(self, blocks: Sequence[int], tokens: NDArray[np.int64], start: int) -> None:
        """Note that `blocks` now hold keys and values of all `tokens`, those from `start` on since this step.

        Only recorded blocks are found as prefixes and stay cached.
        """
        size = self.block_size
        for i in range(start // size, self.blocks_for(len(tokens))):
            block, parent = blocks[i], ROOT if i == 0 else self._hash[blocks[i - 1]]
            if parent is None:
                raise IntegrityError(f"block {blocks[i - 1]} is followed by block {block} but isn't full")
            had, has = self._filled[block], min(len(tokens) - i * size, size)
            self._tokens[block, had:has] = tokens[i * size + had : i * size + has]
            self._filled[block] = has
            if self._parent[block] is None:
                self._parent[block] = parent
                self._children.setdefault(parent, {})[block] = None
            if has == size and self._hash[block] is None:
                key = hashlib.blake2b(parent + self._tokens[block].tobytes(), digest_size=16).digest()
                self._hash[block] = key
                self._by_hash.setdefault(key, block)

    def free(self, blocks: list[int], *, keep: bool = True) -> None:
        """Give back a sequence's blocks and empty the list. keep=False: their contents can't be trusted."""
        for block in reversed(blocks):  # the end of a sequence is evicted before its beginning
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if keep and self.prefix_cache and self._is_findable(block):
                self._cached[block] = None
            else:
                self._forget(block)
                heapq.heappush(self._free, block)
                self._dead.add(block)
        blocks.clear()

    def drain_dead(self) -> list[int]:
        """Blocks that died since the last call and have no new owner, in order."""
        dead = sorted(self._dead)
        self._dead.clear()
        return dead

    def states(self) -> list[tuple[int, bool, int]]:
        """For each block: how many sequences own it, whether it is cached, and how many of its tokens are known."""
        return [(self._references[b], b in self._cached, self._filled[b]) for b in range(self.num_blocks)]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with `tables`, the blocks of every sequence there is. Raises IntegrityError."""
        owners = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            if self._references[block] != owners[block]:
                raise IntegrityError(
                    f"block {block} counts {self._references[block]} references and {owners[block]} sequences hold it"
                )
        used = {block for block, count in owners.items() if count}
        states = Counter([*self._free, *self._cached, *used])
        for block in range(self.num_blocks):
            if states[block] != 1:
                raise IntegrityError(f"block {block} is in {states[block]} of the states free, cached, used")
        if len(states) != self.num_blocks or not self._dead <= set(self._free):
            raise IntegrityError(f"free {self._free}, cached {list(self._cached)}, used {used}, dead {self._dead}")
        for block in self._free:
            if self._parent[block] is not None or self._hash[block] is not None or self._filled[block]:
                raise IntegrityError(f"block {block} is free and can still be found by its tokens")
        for block in self._cached:
            if not self._is_findable(block):
                raise IntegrityError(f"block {block} is cached and can't be found by its tokens")
        known = {block: parent for parent, children in self._children.items() for block in children}
        if known != {b: p for b, p in enumerate(self._parent) if p is not None} or not all(self._children.values()):
            raise IntegrityError("the index of blocks by what comes before them is out of step")
        if any(self._hash[block] != key for key, block in self._by_hash.items()):
            raise IntegrityError("the index of blocks by hash is out of step")

    def _match(self, tokens: NDArray[np.int64]) -> tuple[tuple[int, ...], int | None, int]:
        """Blocks that hold a prefix of `tokens`: full ones, then a partial one and how many of its tokens fit."""
        parent, shared, size = ROOT, [], self.block_size
        for start in range(0, len(tokens) - size + 1, size):
            part = tokens[start : start + size].astype(np.int32)
            key = hashlib.blake2b(parent + part.tobytes(), digest_size=16).digest()
            block = self._by_hash.get(key)
            if block is None:
                break
            shared.append(block)
            parent = key
        rest = tokens[len(shared) * size :][: size - 1].astype(np.int32)  # full ones are shared, never copied
        candidates = list(self._children.get(parent, ()))
        if not candidates or not len(rest):
            return tuple(shared), None, 0
        differs = self._tokens[candidates, : len(rest)] != rest
        common = np.where(differs.any(axis=1), differs.argmax(axis=1), len(rest))
        common = np.minimum(common, [self._filled[block] for block in candidates])
        best = int(common.argmax())
        if common[best] == 0:
            return tuple(shared), None, 0
        return tuple(shared), candidates[best], int(common[best])

    def _acquire(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _take(self) -> int:
        """An empty block for one owner: the lowest free one, else the least recently used cached one."""
        if self._free:
            block = heapq.heappop(self._free)
            self._dead.discard(block)
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            self._forget(block)
        self._references[block] = 1
        return block

    def _is_findable(self, block: int) -> bool:
        """Whether a match can return this block; of equal full blocks only the first can be."""
        key = self._hash[block]
        return self._filled[block] > 0 and (key is None or self._by_hash.get(key) == block)

    def _truncate(self, block: int, num_tokens: int) -> None:
        """Keep only the first tokens of a block, because what follows is about to be overwritten."""
        key = self._hash[block]
        if key is not None and num_tokens < self.block_size:
            if self._by_hash.get(key) == block:
                del self._by_hash[key]
            self._hash[block] = None
        self._filled[block] = num_tokens

    def _forget(self, block: int) -> None:
        self._truncate(block, 0)
        parent = self._parent[block]
        if parent is not None:
            del self._children[parent][block]
            if not self._children[parent]:
                del self._children[parent]
            self._parent[block] = None
