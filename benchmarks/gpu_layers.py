"""What products and norms of whole layers take one after the other in a CUDA graph, which is not the sum of what each takes alone.

    python benchmarks/gpu_layers.py [--rows 1,8,24,64] [--weights float16,int8x8] [--json FILE]

Layers of Llama-2-7B's sizes, without attention, each with weights of its own, launched as an engine launches them. `as built`: kernels start
while the one before ends where they gain by it; `late`: none does. Microseconds a layer, the best of three medians, the ways interleaved.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_attention import copy_bandwidth, write
from tables import show

from llmlab.cuda import Device, Stream
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import compile_kernels, norm_source
from llmlab.kernels.gpu.launch_norm import NormKind
from llmlab.kernels.gpu.launch_product import ProductKind
from llmlab.kernels.norms import NormPointers, RowNorm
from llmlab.kernels.product_sources import product_sources
from llmlab.kernels.products import Product, ProductPointers

HALF, LAYERS = "float16", 16
HIDDEN, INNER = 4096, 11008


def kinds(weights: str) -> dict[str, ProductKind]:
    stored, x = ("int8", "int8") if weights == "int8x8" else (weights, "")
    plain = ProductKind(HIDDEN, HIDDEN, HALF, HALF, stored, x=x)
    return {
        "qkv": replace(plain, width=3 * HIDDEN),
        "o": replace(plain, add=True),
        "gate_up": replace(plain, width=INNER, gate="silu"),
        "down": replace(plain, depth=INNER, add=True),
    }


def as_launched(kernels: KernelSet, late: bool) -> KernelSet:
    if not late:
        return kernels
    return KernelSet(replace(k, constants={**k.constants, "EARLY": False}) for k in kernels.kernels)


class Layers:
    """Random weights, and the graph of a step through all of them."""

    def __init__(self, weights: str, rows: int) -> None:
        self.kinds, self.rows = kinds(weights), rows
        make = {"device": "cuda"}
        self.weights = [
            {n: torch.randint(-100, 100, k.weight_shape, dtype=torch.int8, **make) if k.bits < 16
             else torch.randn(k.weight_shape, dtype=torch.float16, **make) / 64 for n, k in self.kinds.items()}
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.scales = {n: torch.rand(k.outputs, **make).half() / 4096 for n, k in self.kinds.items()}
        self.ones = torch.ones(HIDDEN, **make)
        widths = {"x": HIDDEN, "h": HIDDEN, "qkv": 3 * HIDDEN, "inner": INNER, "y": HIDDEN}
        self.at = {n: torch.randn(rows, w, dtype=torch.float16, **make) for n, w in widths.items()}
        self.scratch = torch.empty(rows * (INNER + 4), dtype=torch.int8, **make)
        self.norm = NormKind(HIDDEN, HALF, HALF, "float32", 1e-5)

    def capture(self, kernels: KernelSet, device: Device) -> Any:
        made = {n: Product(kernels, device, k) for n, k in self.kinds.items()}
        norm = RowNorm(kernels, device, self.norm)
        self.stream = Stream()
        with self.stream.capture() as graph:
            for weights in self.weights:
                self._norm(norm, "x")
                self._multiply(made, weights, "qkv", "h", HIDDEN, "qkv")
                self._multiply(made, weights, "o", "qkv", 3 * HIDDEN, "y", "x")
                self._norm(norm, "y")
                self._multiply(made, weights, "gate_up", "h", HIDDEN, "inner")
                self._multiply(made, weights, "down", "inner", INNER, "x", "y")
        return graph

    def _norm(self, norm: RowNorm, x: str) -> None:
        at = NormPointers(self.at[x].data_ptr(), HIDDEN, self.ones.data_ptr(), self.at["h"].data_ptr())
        norm.enqueue(self.stream, at, rows=self.rows)

    def _multiply(self, made: Any, weights: Any, name: str, x: str, stride: int, out: str, add: str = "") -> None:
        at = ProductPointers(
            self.at[x].data_ptr(), stride, weights[name].data_ptr(), self.at[out].data_ptr(), self.scales[name].data_ptr(),
            add=self.at[add].data_ptr() if add else 0, scratch=self.scratch.data_ptr(),
        )  # fmt: skip
        made[name].enqueue(self.stream, at, rows=self.rows)


def us_a_layer(graph: Any, repeats: int = 30) -> float:
    stream = torch.cuda.current_stream()
    found = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.launch(stream.cuda_stream)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / LAYERS)
    return median(found)


def measured(weights: str, rows: int, device: Device, architecture: int) -> list[dict[str, Any]]:
    layers, graphs = Layers(weights, rows), {}
    sources = [s for kind in layers.kinds.values() for s in product_sources(kind, rows)]
    kernels = compile_kernels([*sources, norm_source(layers.norm)], [architecture])
    for way in ("as built", "late"):
        graphs[way] = layers.capture(as_launched(kernels, way == "late"), device)
    best = dict.fromkeys(graphs, float("inf"))
    for _ in range(3):
        for way, graph in graphs.items():
            best[way] = min(best[way], us_a_layer(graph))
    return [{"weights": weights, "rows": rows, "way": way, "us": round(us, 1)} for way, us in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 24, 64])
    parser.add_argument("--weights", type=lambda text: text.split(","), default=[HALF, "int8x8"])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    device, architecture = Device.open(torch.cuda.current_device()), 10 * card.major + card.minor
    rows = []
    for weights in given.weights:
        for count in given.rows:
            rows += measured(weights, count, device, architecture)
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    show("microseconds a layer", rows)
    if given.json is not None:
        write(given.json, "python benchmarks/gpu_layers.py", copy_bandwidth(), rows=rows)


if __name__ == "__main__":
    main()
