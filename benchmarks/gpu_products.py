"""Linear layers' products on an NVIDIA GPU: microseconds and bandwidth of our kernels beside torch's (cuBLAS), in the same run.

    python benchmarks/gpu_products.py [--json FILE]                      # all products of Llama-2-7B and Llama-3-8B
    python benchmarks/gpu_products.py --tune [--limit SECONDS] [--json FILE] [--rows 1,8,64,2048] [--weights float16,int8,int4] [--shapes o,down]

Kernels are those that an engine launches: compiled ahead of time, started on raw pointers, captured in a CUDA graph. Each graph goes through
several copies of the weight, more than 200 MB together, so that the L2 cache holds none of them. A gated product is compared with the plain
product of both halves. Errors are relative to float32. `--tune` tries a list of ways to cut each product until the time is over.
"""

from __future__ import annotations

import argparse
import json
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from product_tuning import Compilers, cuts
from tables import show

from llmlab.cuda import Device
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import KernelSource, compile_kernels, product_source, product_sources
from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.launch_product import ProductKind, Tile, Vector
from llmlab.kernels.loaded import LoadedKernel

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
MODELS = {
    "llama-2-7b": ("qkv", "o", "gate_up", "down"),
    "llama-3-8b": ("qkv 8b", "o", "gate_up 8b", "down 8b"),
}
WEIGHTS = {"float16": (HALF, 0), "int8": ("int8", 0), "int4": ("int4", 128), "int4 in groups of 32": ("int4", 32)}
DEVICE = "cuda"
ROTATED = 256 << 20  # bytes of weights that one graph reads, at least


def kind_of(shape: str, weights: str) -> ProductKind:
    depth, width, gate = SHAPES[shape]
    weight, group = WEIGHTS[weights]
    return ProductKind(depth, width, HALF, HALF, weight, group, gate)


class Product:
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
        self.expected = self._expected()

    def _expected(self) -> torch.Tensor:
        kind, weight = self.kind, self.weights[-1].float()
        if kind.bits == 4:
            bytes_ = self.weights[-1].to(torch.int32)
            weight = torch.stack([(bytes_ << 28) >> 28, bytes_ >> 4], -1).reshape(kind.outputs, kind.depth).float()
        if self.scale is not None:
            each = kind.group or kind.depth
            weight = weight * self.scale.float().reshape(kind.outputs, -1).repeat_interleave(each, 1)
        found = self.x.float() @ weight.T
        if kind.gate:
            found = torch.nn.functional.silu(found[:, : kind.width]) * found[:, kind.width :]
        return found

    def error(self) -> float:
        return float((self.out.float() - self.expected).norm() / self.expected.norm())

    def values(self, weight: torch.Tensor) -> dict[str, int]:
        scale = 0 if self.scale is None else self.scale.data_ptr()
        pointers = {"x": self.x.data_ptr(), "weight": weight.data_ptr(), "scale": scale, "out": self.out.data_ptr()}
        sizes = {"rows": self.rows, "depth": self.kind.depth, "width": self.kind.width, "x_stride": self.x.stride(0)}
        return {**pointers, **sizes, "bias": 0, "add": 0}

    def measure(self, kernels: KernelSet, device: Device, cut: Vector | Tile | None = None) -> dict[str, Any]:
        name, launch = launch_product.launch(self.kind, self.rows, cut)
        kernel = LoadedKernel(kernels, device, name, launch_product.labels(self.kind, launch))
        values = [self.values(weight) for weight in self.weights]

        def run() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for each in values:
                kernel.launch(launch.grid, each, stream)

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


def wanted(given: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    for rows in given.rows:
        for weights in given.weights:
            for shape in given.shapes:
                yield shape, weights, rows


def tune(given: argparse.Namespace, device: Device, architecture: int) -> list[dict[str, Any]]:
    """Every cut of every product, until the time is over; those of one kernel together, since it is compiled once."""
    began = time.perf_counter()
    problems = list(wanted(given))
    plans: dict[str, tuple[int, KernelSource, list[tuple[Any, Vector | Tile]]]] = {}
    for shape, weights, rows in problems:
        kind = kind_of(shape, weights)
        for rank, cut in enumerate([launch_product.tile(kind, rows), *cuts(kind, rows)]):
            source = product_source(kind, *launch_product.launch(kind, rows, cut))
            _, _, places = plans.setdefault(json.dumps(asdict(source), sort_keys=True), (rank, source, []))
            if ((shape, weights, rows), cut) not in places:
                places.append(((shape, weights, rows), cut))
    order = sorted(plans.values(), key=lambda plan: plan[0])
    print(f"{len(problems)} products, {len(order)} kernels, {sum(len(p[2]) for p in order)} cuts", flush=True)
    made: dict[Any, Product] = {}
    found: list[dict[str, Any]] = []
    compilers = Compilers([source for _, source, _ in order], architecture)
    try:
        for count in range(len(order)):
            left = given.limit - (time.perf_counter() - began)
            try:
                n, kernel = compilers.done.get(timeout=max(0.01, left))
            except queue.Empty:
                break
            if left <= 0:
                break
            for problem, cut in order[n][2] if kernel is not None else ():
                shape, weights, rows = problem
                about = {"shape": shape, "weights": weights, "rows": rows}
                try:
                    if problem not in made:
                        make_room(made)
                        made[problem] = Product(kind_of(shape, weights), rows)
                    row = {**about, **made[problem].measure(KernelSet([kernel]), device, cut), "cut": repr(cut)}
                except Exception as trouble:
                    row = {**about, "cut": repr(cut), "failed": str(trouble)[:200]}
                    print(row, flush=True)
                found.append(row)
            if count % 40 == 39:
                print(f"{count + 1} kernels, {time.perf_counter() - began:.0f} s", flush=True)
                save(given.json, found)
    finally:
        compilers.stop()
    return found


def make_room(made: dict[Any, Product]) -> None:
    """Forget the oldest products where the card's memory is short."""
    while made and torch.cuda.mem_get_info()[0] < 12 << 30:
        made.pop(next(iter(made)))
        torch.cuda.empty_cache()


def best(found: list[dict[str, Any]], each: int = 4) -> list[dict[str, Any]]:
    """The fastest cuts of each product, those that were right."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in found:
        if row.get("error", 1.0) < 5e-3:
            groups.setdefault((row["weights"], row["rows"], row["shape"]), []).append(row)
    return [row for group in groups.values() for row in sorted(group, key=lambda row: row["us"])[:each]]


def bench(given: argparse.Namespace, device: Device, architecture: int) -> list[dict[str, Any]]:
    """The cuts that engines use, beside cuBLAS."""
    problems = list(wanted(given))
    sources = (s for shape, weights, rows in problems for s in product_sources(kind_of(shape, weights), rows)[-1:])
    kernels = compile_kernels(sources, [architecture])
    found = []
    for shape, weights, rows in problems:
        torch.cuda.empty_cache()
        try:
            product = Product(kind_of(shape, weights), rows)
            row = {"shape": shape, "weights": weights, "rows": rows, **product.measure(kernels, device)}
            cublas = product.cublas_us()
            row |= {"cublas_fp16_us": round(cublas, 2), "against_cublas": round(cublas / row["us"], 2)}
            if rows >= 128:
                row["tflop_per_s"] = round(2 * rows * product.kind.outputs * product.kind.depth / row["us"] / 1e6)
        except Exception as trouble:
            row = {"shape": shape, "weights": weights, "rows": rows, "failed": str(trouble)[:200]}
            print(row, flush=True)
        found.append(row)
        save(given.json, found)
    return found


def layers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The products of a whole layer, added up."""
    times = {(r["shape"], r["weights"], r["rows"]): (r["us"], r.get("cublas_fp16_us", 0.0)) for r in found if "us" in r}
    result = []
    for weights, rows in dict.fromkeys((r["weights"], r["rows"]) for r in found):
        for model, shapes in MODELS.items():
            parts = [times.get((shape, weights, rows)) for shape in shapes]
            if None not in parts:
                ours, cublas = (round(sum(part[n] for part in parts if part), 1) for n in range(2))
                result.append(
                    {"layer of": model, "weights": weights, "rows": rows, "us": ours, "cublas_fp16_us": cublas}
                )
    return result


def save(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file, as they come")
    parser.add_argument("--tune", action="store_true", help="try many cuts")
    parser.add_argument("--limit", type=float, default=200, help="seconds that --tune may take")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 2048])
    parser.add_argument("--weights", type=lambda text: text.split(","), default=["float16", "int8", "int4"])
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    given = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.multi_processor_count} multiprocessors", flush=True)
    device = Device.open(torch.cuda.current_device())
    found = (tune if given.tune else bench)(given, device, 10 * card.major + card.minor)
    save(given.json, found)
    shown = best(found) if given.tune else [row for row in found if "us" in row]
    if shown:
        show("fastest cuts" if given.tune else "products", shown)
    fastest = {(r["shape"], r["weights"], r["rows"]): r for r in reversed(shown)}
    if summed := layers(list(fastest.values())):
        show("whole layers", summed)


if __name__ == "__main__":
    main()
