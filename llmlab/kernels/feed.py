"""The step before's tokens as this step's inputs, on raw device pointers: no torch, no triton."""

from __future__ import annotations

from typing import SupportsInt

from llmlab.cuda import Device
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu.geometry import feed
from llmlab.kernels.loaded import LoadedKernel


class TokenFeed:
    """Replaces references to sampled tokens by the tokens. EngineError where the engine has no kernel for this GPU."""

    def __init__(self, kernels: KernelSet, device: Device) -> None:
        self._kernel = LoadedKernel(kernels, device, "feed_tokens", feed(1).constants)

    def enqueue(self, stream: SupportsInt, *, ids: int, previous: int, count: int) -> None:
        """ids: int32 [count], in place; -1 - j refers to previous[j] (int32), of which a -1, no token, becomes 0."""
        self._kernel.launch(feed(count).grid, {"ids": ids, "previous": previous, "count": count}, stream)
