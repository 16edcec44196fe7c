"""Linear layers' products on an NVIDIA GPU: microseconds and bandwidth of our kernels beside torch's (cuBLAS), in the same run.

    python benchmarks/gpu_products.py [--json FILE]                      # all products of Llama-2-7B and Llama-3-8B
    python benchmarks/gpu_products.py --tune [--limit SECONDS] [--json FILE] [--rows 1,8,64,2048] [--weights float16,int8,int4,int8x8] [--shapes o,down]

Kernels are those that an engine launches: compiled ahead of time, started on raw pointers, captured in a CUDA graph. Each graph goes through
several copies of the weight, more than 200 MB together, so that the L2 cache holds none of them. A gated product is compared with the plain
product of both halves. int8x8 is int8 by int8: x is made int8 before every product, which counts, but not for `--tune`. Errors are relative to float32. `--tune` tries a list of ways to cut each product until the time is over.
"""

from __future__ import annotations

import argparse
import json
import queue
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from product_problem import SHAPES, WEIGHTS, Problem, kind_of
from product_tuning import Compilers, cuts
from tables import show

from llmlab.cuda import Device
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import compile_kernels
from llmlab.kernels.gpu import launch_product
from llmlab.kernels.gpu.launch_product import Tile, Vector
from llmlab.kernels.product_sources import product_source, product_sources
from llmlab.kernels.source import KernelSource

MODELS = {
    "llama-2-7b": ("qkv", "o", "gate_up", "down"),
    "llama-3-8b": ("qkv 8b", "o", "gate_up 8b", "down 8b"),
}


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
    made: dict[Any, Problem] = {}
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
                        made[problem] = Problem(kind_of(shape, weights), rows)
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


def make_room(made: dict[Any, Problem]) -> None:
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
    sources = (s for shape, weights, rows in problems for s in product_sources(kind_of(shape, weights), rows))
    kernels = compile_kernels(sources, [architecture])
    found = []
    for shape, weights, rows in problems:
        torch.cuda.empty_cache()
        try:
            problem = Problem(kind_of(shape, weights), rows)
            row = {"shape": shape, "weights": weights, "rows": rows, **problem.measure(kernels, device)}
            cublas = problem.cublas_us()
            row |= {"cublas_fp16_us": round(cublas, 2), "against_cublas": round(cublas / row["us"], 2)}
            if rows >= 128:
                row["tflop_per_s"] = round(2 * rows * problem.kind.outputs * problem.kind.depth / row["us"] / 1e6)
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
    parser.add_argument("--weights", type=lambda text: text.split(","), default=list(WEIGHTS))
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
