"""RMS normalization on raw device pointers, from a kernel that was compiled ahead of time: no torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsInt

from llmlab.cuda import Device
from llmlab.errors import EngineError
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.launch_norm import NormKind, launch
from llmlab.kernels.loaded import LoadedKernel


@dataclass
class NormPointers:
    """Device addresses of what a norm reads and writes, at multiples of 16 bytes; see `NormKind`.

    x [rows, width]: its rows lie `x_stride` elements apart, a multiple of 16. weight [width] and out [rows, width] are contiguous.
    """

    x: int
    x_stride: int
    weight: int
    out: int


class RowNorm:
    """One RMS norm; those of one kind may share it. EngineError where the engine has no kernel for this GPU."""

    def __init__(self, kernels: KernelSet, device: Device, kind: NormKind) -> None:
        self.kind = kind
        self._kernel = LoadedKernel(kernels, device, "rms_norm", kind.labels)

    def enqueue(self, stream: SupportsInt, pointers: NormPointers, *, rows: int) -> None:
        """Normalize `rows` rows. It only launches, so it can be captured in a CUDA graph."""
        if not rows:
            return
        p, kind = pointers, self.kind
        if (p.x | p.weight | p.out) & 15 or p.x_stride & 15:
            raise EngineError(
                f"a norm needs tensors at multiples of 16 bytes and rows of x a multiple of 16 elements apart, given {p}: lay them out so"
            )
        values = {**vars(p), "epsilon": kind.epsilon, "width": kind.width}
        self._kernel.launch(launch(kind, rows).grid, values, stream)
