"""The next token of every row of logits, on raw device pointers, from kernels that were compiled ahead of time: no torch, no triton."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, SupportsInt

import numpy as np

from llmlab.cuda import Device
from llmlab.errors import EngineError
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.geometry import SamplingGrid
from llmlab.kernels.loaded import LoadedKernel


@dataclass(frozen=True)
class SamplingPointers:
    """Device addresses of what sampling reads and writes, N rows each.

    logits: [N, vocab] of the type that the kernels were compiled for, contiguous. temperature (0: greedy), top_p (1: off), min_p (0: off) and
    uniform (in [0, 1)): float32 [N]. top_k (0: off): int32 [N]. tokens: int32 [N], the result, -1 where the largest logit of a row is not finite.
    scratch: `TokenSampler.scratch_bytes`, at a multiple of 16 bytes.
    """

    tokens: int
    logits: int
    temperature: int
    top_k: int
    top_p: int
    min_p: int
    uniform: int
    scratch: int


class TokenSampler:
    """Chooses tokens as `runtime.sampler.draw` does. EngineError where the engine has no kernels for this GPU.

    Penalties, biases, bans and log probabilities are none of its business: whoever wants them takes the row of logits.
    """

    def __init__(self, kernels: KernelSet, device: Device, vocab: int, dtype: str = "float32") -> None:
        self._vocab, self._multiprocessors = vocab, device.multiprocessors
        self._kernels = {
            name: LoadedKernel(kernels, device, name, {**launch.constants, "dtype": dtype})
            for name, launch in SamplingGrid(1, vocab, 1).launches().items()
        }

    def scratch_bytes(self, rows: int) -> int:
        """What to allocate for steps of up to `rows` rows."""
        return _plan(rows, self._vocab, self._multiprocessors).scratch_bytes

    def enqueue(self, stream: SupportsInt, pointers: SamplingPointers, *, rows: int, drawn: bool) -> None:
        """Fill `tokens` of `rows` rows. It only launches, so it can be captured in a CUDA graph.

        drawn: rows with a temperature are among them. Without, two launches instead of nine.
        """
        if not rows:
            return
        if (pointers.logits | pointers.scratch) & 15:
            raise EngineError(
                f"sampling needs logits and scratch at multiples of 16 bytes, given {pointers}: lay them out so"
            )
        plan = _plan(rows, self._vocab, self._multiprocessors)
        values = {**vars(pointers), "splits": plan.splits}
        values |= {name: pointers.scratch + start for name, start in plan.scratch.items()}
        for name, grid in plan.grids.items():
            if drawn or name in ("sample_peaks", "sample_choose"):
                for step in range(6 if name == "sample_narrow" else 1):
                    values["step"] = step
                    self._kernels[name].launch(grid, values, stream)


class _Plan(NamedTuple):
    """What is launched for a number of rows."""

    splits: int
    grids: dict[str, tuple[int, ...]]
    scratch: dict[str, int]
    """Where each part begins, in bytes."""
    scratch_bytes: int


@lru_cache(maxsize=512)  # made once a number of rows: that costs more than the launches
def _plan(rows: int, vocab: int, multiprocessors: int) -> _Plan:
    grid = SamplingGrid.fill(rows, vocab, multiprocessors)
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (dtype, shape) in grid.scratch_shapes.items()}
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    grids = {name: launch.grid for name, launch in grid.launches().items()}
    return _Plan(grid.splits, grids, starts, sum(sizes.values()))
