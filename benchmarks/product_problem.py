"""Products of known models with random weights, and how long they take: for `gpu_products.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from llmlab.cuda import Device
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.launch_product import ProductKind, Tile, Vector
from llmlab.kernels.loaded import LoadedKernel
from llmlab.kernels.products import Product, ProductPointers

HALF = "float16"
SHAPES = {
    "o": (4096, 4096, ""),
    "gate_up": (4096, 11008, "silu"),
    "down": (11008, 4096, ""),
    "qkv": (4096, 12288, ""),
    "head": (4096, 32000, ""),
    "gate_up 8b": (4096, 14336, "silu"),
    "down 8b": (14336, 4096, ""),
    "qkv 8b": (4096, 6144, ""),
    "head 8b": (4096, 128256, ""),
}
WEIGHTS = {"float16": (HALF, 0), "int8": ("int8", 0), "int4": ("int4", 128), "int8x8": ("int8", 0)}
DEVICE = "cuda"
ROTATED = 256 << 20  # bytes of weights that one graph reads, at least


def kind_of(shape: str, weights: str) -> ProductKind:
    depth, width, gate = SHAPES[shape]
    weight, group = WEIGHTS[weights]
    return ProductKind(depth, width, HALF, HALF, weight, group, gate, x="int8" if weights == "int8x8" else "")


class Problem:
    """Copies of one product's weight, an x, and what comes of the last copy in float32."""

    def __init__(self, kind: ProductKind, rows: int) -> None:
        self.kind, self.rows = kind, rows
        count = kind.weight_shape[0] * kind.weight_shape[1]
        self.nbytes = count * (2 if kind.bits == 16 else 1)
        self.copies = max(2, -(-ROTATED // self.nbytes))
        make = {"device": DEVICE}
        if kind.bits == 16:
            weights = [
                torch.empty(kind.weight_shape, dtype=torch.float16, **make).normal_() for _ in range(self.copies)
            ]
        else:
            shape = (self.copies, *kind.weight_shape)
            weights = list(torch.randint(-128, 128, shape, dtype=torch.int8, **make))
        self.weights = weights
        self.scale = None if kind.scale_shape is None else torch.rand(kind.scale_shape, **make).half() / 64 + 1 / 128
        self.x = torch.randn(rows, kind.depth, dtype=torch.float16, **make) / 64
        self.out = torch.empty(rows, kind.width, dtype=torch.float16, **make)
        wide = 2 * kind.outputs * kind.depth if launch_product.widens(kind, rows) else 0
        self.scratch = torch.empty(max(rows * (kind.depth + 4), wide), dtype=torch.int8, **make)
        self.integers = None
        real = self.x.float()
        if kind.x:
            steps = real.abs().amax(1) / 127
            self.integers = ((real / steps[:, None]).round().to(torch.int8), steps)
            real = self.integers[0].float() * steps[:, None]
        self.expected = self._expected(real)

    def _expected(self, x: torch.Tensor) -> torch.Tensor:
        kind, weight = self.kind, self.weights[-1].float()
        if kind.bits < 16 and not kind.x:  # see kernels/packing.py
            places = 16 // kind.bits
            words = self.weights[-1].view(torch.int16).reshape(kind.outputs, -1, 8).to(torch.int32)
            unused = 32 - kind.bits
            integers = [(words << (unused - kind.bits * n)) >> unused for n in range(places)]
            weight = torch.stack(integers, 2).reshape(kind.outputs, kind.depth).float()
        if self.scale is not None:
            each = kind.group or kind.depth
            weight = weight * self.scale.float().reshape(kind.outputs, -1).repeat_interleave(each, 1)
        found = x @ weight.T
        if kind.gate:
            found = torch.nn.functional.silu(found[:, : kind.width]) * found[:, kind.width :]
        return found

    def error(self) -> float:
        return float((self.out.float() - self.expected).norm() / self.expected.norm())

    def measure(self, kernels: KernelSet, device: Device, cut: Vector | Tile | None = None) -> dict[str, Any]:
        """With a cut the product's kernel alone; without, all that an engine launches."""
        kind, rows = self.kind, self.rows
        x, x_scale = self.integers or (self.x, self.x)
        at = {
            "x": self.x.data_ptr(),
            "out": self.out.data_ptr(),
            "scratch": self.scratch.data_ptr(),
            "x_stride": kind.depth,
        }
        at["scale"] = 0 if self.scale is None else self.scale.data_ptr()
        weights = [weight.data_ptr() for weight in self.weights]
        if cut is None:
            product = Product(kernels, device, kind)

            def launch(stream: int, weight: int) -> None:
                product.enqueue(stream, ProductPointers(**at, weight=weight), rows=rows)

        else:
            name, start = launch_product.launch(kind, rows, cut)
            kernel = LoadedKernel(kernels, device, name, launch_product.labels(kind, start))
            at |= {
                "x": x.data_ptr(),
                "x_scale": x_scale.data_ptr(),
                "rows": rows,
                "depth": kind.depth,
                "width": kind.width,
            }

            def launch(stream: int, weight: int) -> None:
                kernel.launch(start.grid, {**at, "weight": weight}, stream)

        def run() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for weight in weights:
                launch(stream, weight)

        self.out.fill_(torch.nan)
        us = replay_us(run) / self.copies
        return {"us": round(us, 2), "tb_per_s": round(self.nbytes / us / 1e6, 2), "error": round(self.error(), 6)}

    def cublas_us(self) -> float:
        """Of torch's product with float16 weights, whatever the type of ours."""
        weights = self.weights
        if self.kind.bits < 16:
            shape = (self.kind.outputs, self.kind.depth)
            count = max(2, -(-ROTATED // (2 * shape[0] * shape[1])))
            weights = [torch.empty(shape, dtype=torch.float16, device=DEVICE).normal_() for _ in range(count)]
        out = torch.empty(self.rows, self.kind.outputs, dtype=torch.float16, device=DEVICE)

        def run() -> None:
            for weight in weights:
                torch.mm(self.x, weight.T, out=out)

        return replay_us(run) / len(weights)


def replay_us(run: Callable[[], None]) -> float:
    """Microseconds of `run` without its launches: captured once, replayed; the median of nine."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    times, repeats = [], max(1, min(8, int(1e-3 / max(time.perf_counter() - began, 1e-6))))
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / repeats)
    return sorted(times)[len(times) // 2]
