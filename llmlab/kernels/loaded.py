"""A kernel that was compiled ahead of time, on its GPU: launched by its parameters' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsInt

from llmlab.cuda import Arguments, Device
from llmlab.kernels.binaries import KernelSet


class LoadedKernel:
    """One kernel of `kernels` for this GPU. EngineError where there is none."""

    def __init__(self, kernels: KernelSet, device: Device, name: str, constants: Mapping[str, Any]) -> None:
        kernel = kernels.find(name, constants, device.compute_capability)
        self.aligned = kernel.aligned
        self._names = [name for name, _ in kernel.parameters]
        self._early = bool(kernel.constants.get("EARLY"))
        self._threads = 32 * kernel.num_warps
        self._arguments = Arguments([*(kind for _, kind in kernel.parameters), "ptr", "ptr"])
        self._function = device.module(kernel.cubin).function(kernel.name, kernel.shared)

    def launch(self, grid: Sequence[int], values: Mapping[str, float], stream: SupportsInt) -> None:
        """Start it with those of `values` that it has parameters for."""
        self._arguments.set(
            *[values[name] for name in self._names], 0, 0
        )  # then Triton's scratch, which none of ours uses
        self._function.launch(grid, self._threads, self._arguments, stream, early=self._early)
