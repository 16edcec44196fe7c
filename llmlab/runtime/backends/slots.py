"""KV slots in reserved memory: pages are committed as tokens arrive and given back when a sequence ends."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import EngineError

_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on
_NOHUGEPAGE = 15
_PAGE = mmap.PAGESIZE


class SlotPool:
    """Keys and values of every layer for `slots` sequences of up to `capacity` tokens each.

    `layers[i]` is [2, slots, kv_heads, capacity, head_dim], keys first, in one anonymous mapping: a page costs
    memory from the first token written to it until `release`. Large pages are declined, or a token would cost 2 MB.
    dtype: float32 or int8; int4 lies in uint8 [.., head_dim / 2], two numbers in a byte.
    """

    def __init__(self, layers: Sequence[tuple[int, int]], slots: int, capacity: int, dtype: str = "float32") -> None:
        held = np.dtype(np.uint8 if dtype == "int4" else dtype)
        numbers = 2 if dtype == "int4" else 1
        shapes = [(2, slots, heads, capacity, dim // numbers) for heads, dim in layers]
        sizes = [int(np.prod(shape, dtype=np.int64)) * held.itemsize for shape in shapes]
        sizes = [-(-size // _PAGE) * _PAGE for size in sizes]
        try:
            self._memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except (OSError, ValueError, OverflowError) as problem:
            raise EngineError(
                f"can't reserve {sum(sizes) / 1e9:.1f} GB of address space for {slots} slots of {capacity} tokens ({problem}): "
                "lower max_num_seqs, or build with a smaller max_seq_len"
            ) from problem
        self._memory.madvise(_NOHUGEPAGE)
        self._offsets = np.cumsum([0, *sizes[:-1]]).tolist()
        self.layers: list[NDArray[Any]] = [
            np.frombuffer(self._memory, held, int(np.prod(shape)), offset).reshape(shape)
            for shape, offset in zip(shapes, self._offsets, strict=True)
        ]

    def copy(self, src: int, dst: int, tokens: int) -> None:
        """Copy the first `tokens` keys and values of slot `src` to slot `dst`, in every layer."""
        for layer in self.layers:
            layer[:, dst, :, :tokens] = layer[:, src, :, :tokens]

    def release(self, slots: Sequence[int]) -> None:
        """Give the memory of `slots` back to the operating system; what they held reads as zeros."""
        for layer, offset in zip(self.layers, self._offsets, strict=True):
            one, half = layer[0, 0].nbytes, layer[0].nbytes
            for slot in slots:
                for what in range(2):
                    start = offset + what * half + slot * one
                    first, last = -(-start // _PAGE) * _PAGE, (start + one) // _PAGE * _PAGE
                    if last > first:
                        self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
