"""A linear layer's product on raw device pointers, from kernels that were compiled ahead of time: no torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import SupportsInt

from llmlab.cuda import Device
from llmlab.errors import EngineError
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.launch_product import ROW_CLASSES, ProductKind
from llmlab.kernels.loaded import LoadedKernel


@dataclass
class ProductPointers:
    """Device addresses of what a product reads and writes, at multiples of 16 bytes; see `ProductKind`. 0 for what it doesn't have.

    x [rows, depth]: its rows lie `x_stride` elements apart, a multiple of 16. weight [outputs, depth], contiguous, with int4 [outputs, depth / 2]
    bytes, packed. scale: float16 [outputs], or [outputs, depth / group]. bias [outputs], add [rows, width] and out [rows, width], contiguous.
    x_scale: float32 [1], where the kind's x is int8_static. scratch: `Product.scratch_bytes`.
    """

    x: int
    x_stride: int
    weight: int
    out: int
    scale: int = 0
    bias: int = 0
    add: int = 0
    x_scale: int = 0
    scratch: int = 0


class Product:
    """One product; those of one kind may share it. EngineError where the engine has no kernels for this GPU."""

    def __init__(self, kernels: KernelSet, device: Device, kind: ProductKind) -> None:
        self.kind = kind
        self._plan = lru_cache(maxsize=512)(self._launch)
        self._kernels: dict[int, LoadedKernel] = {}
        for most in ROW_CLASSES:  # as far as the engine's largest step
            name, launch = launch_product.launch(kind, most)
            labels = launch_product.labels(launch_product.multiplied(kind, most), launch)
            try:
                self._kernels[most] = LoadedKernel(kernels, device, name, labels)
            except EngineError:
                if not self._kernels:
                    raise
                break
        self._widen: LoadedKernel | None = None
        if launch_product.widens(kind, max(self._kernels)):
            name, launch = launch_product.widen(kind)
            self._widen, self._widen_grid = LoadedKernel(kernels, device, name, launch.constants), launch.grid
        self._quantize: LoadedKernel | None = None
        if kind.x:
            name, launch = launch_product.quantize(kind, 1)
            self._quantize = LoadedKernel(kernels, device, name, {**launch.constants, "DTYPE": kind.dtype})

    def scratch_bytes(self, rows: int) -> int:
        """What to allocate for steps of up to `rows` rows; products may share it. x as int8, then its scales; or the weight made wide."""
        kind = self.kind
        if launch_product.widens(kind, rows):
            return 2 * kind.outputs * kind.depth
        return rows * (kind.depth + 4) if kind.x else 0

    def _launch(self, rows: int) -> tuple[LoadedKernel, tuple[int, ...]]:
        most = launch_product.row_class(rows)
        if most not in self._kernels:
            raise EngineError(
                f"a product of {rows} rows in an engine whose kernels are for {max(self._kernels)}: build it for larger steps"
            )
        return self._kernels[most], launch_product.launch(self.kind, rows)[1].grid

    def enqueue(self, stream: SupportsInt, pointers: ProductPointers, *, rows: int) -> None:
        """out = x · Wᵀ with all that the kind says, for `rows` rows. It only launches, so it can be captured in a CUDA graph."""
        if not rows:
            return
        p, kind = pointers, self.kind
        if (p.x | p.weight | p.out | p.scale | p.bias | p.add | p.x_scale | p.scratch) & 15 or p.x_stride & 15:
            raise EngineError(
                f"a product needs tensors at multiples of 16 bytes and rows of x a multiple of 16 elements apart, given {p}: lay them out so"
            )
        kernel, grid = self._plan(rows)
        values = {**vars(p), "rows": rows, "depth": kind.depth, "width": kind.width}
        if self._quantize is not None:
            x = {"values": p.scratch, "scale": p.scratch + rows * kind.depth, "given": p.x_scale}
            self._quantize.launch((rows,), {**values, **x}, stream)
            values |= {"x": p.scratch, "x_stride": kind.depth, "x_scale": x["scale"]}
        if launch_product.widens(kind, rows):
            assert self._widen is not None
            self._widen.launch(self._widen_grid, {**values, "wide": p.scratch}, stream)
            values["weight"] = p.scratch
        kernel.launch(grid, values, stream)
