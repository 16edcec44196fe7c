"""What `gpu_products.py --tune` tries: ways to cut a product, the likeliest first, and many compilers at once."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from typing import Any

from llmlab.kernels import compile as compiling
from llmlab.kernels.binaries import Kernel
from llmlab.kernels.gpu.launch_product import ProductKind, Tile, Vector, row_class
from llmlab.kernels.source import KernelSource

VECTORS = sorted(
    product((1, 2, 4), (2, 4, 8, 1), (1, 2)), key=lambda cut: (cut[2], cut[0] * cut[1] > 16, cut[0] * cut[1] < 4)
)
"""Columns, warps, unroll."""
# columns, depth, warps, stages
FEW = [(16, 256, 4, 4), (32, 256, 4, 4), (32, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 6), (64, 128, 4, 3), (16, 128, 4, 6),
       (32, 256, 8, 4), (64, 128, 4, 4), (16, 256, 2, 4), (32, 128, 2, 4), (16, 512, 4, 3), (64, 64, 4, 6)]  # fmt: skip
FEW_SWAPPED = [(64, 128, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (128, 64, 4, 4), (32, 256, 4, 4), (64, 256, 4, 3), (128, 128, 8, 3),
               (16, 256, 4, 4), (32, 128, 2, 6), (128, 64, 8, 6), (64, 64, 4, 8)]  # fmt: skip
FILLED = [
    (32, 128, 4, 6),
    (32, 128, 4, 8),
    (64, 64, 4, 8),
    (32, 256, 4, 4),
    (16, 256, 4, 4),
    (32, 64, 4, 10),
    (64, 128, 4, 4),
]  # of 64 rows, however few
INTEGERS = [(64, 128, 4, 4), (32, 128, 4, 5), (64, 128, 4, 6), (32, 256, 4, 4), (64, 256, 4, 4), (128, 128, 4, 4), (128, 128, 8, 4),
            (64, 256, 4, 3), (32, 256, 2, 4), (32, 512, 4, 3), (64, 64, 4, 6), (128, 64, 4, 6), (64, 512, 4, 2), (128, 256, 8, 3),
            (128, 128, 8, 6), (64, 128, 8, 4), (16, 512, 4, 3), (16, 256, 4, 4)]  # fmt: skip
DEQUANTIZED = [(32, 128, 4, 4), (32, 128, 4, 6), (32, 64, 4, 6), (64, 128, 4, 4), (32, 256, 4, 3), (16, 128, 4, 4), (64, 64, 4, 6),
               (32, 128, 8, 4), (64, 128, 8, 4)]  # fmt: skip
"""Of integers beside wide x that go through shared memory as floats: thin tiles, so that every multiprocessor has one."""
# rows, columns, depth, warps, stages
MANY = [(256, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 64, 64, 4, 5),
        (64, 256, 64, 4, 4), (256, 64, 64, 4, 4), (128, 128, 128, 8, 3)]  # fmt: skip
MANY_INTEGERS = [(256, 128, 128, 8, 3), (128, 256, 128, 8, 3), (256, 128, 128, 8, 4), (128, 128, 128, 4, 4), (128, 128, 128, 8, 4),
                 (256, 128, 64, 8, 4), (128, 256, 64, 8, 4)]  # fmt: skip


def cuts(kind: ProductKind, rows: int) -> Iterator[Vector | Tile]:
    """For a step of `rows` rows."""
    most = row_class(rows)
    if most <= 4:
        for columns, warps, unroll in VECTORS:
            yield Vector(most, columns, warps, unroll)
    halves = 2 if kind.gate else 1
    deepest = kind.group or 1 << 10
    for (block, columns, depth, warps, stages), swap in _tiles(kind, max(16, most)):
        for cut in dict.fromkeys(
            (columns // halves if columns > 16 else columns, columns if most <= 128 else columns // halves)
        ):
            tile = Tile(block, cut, min(depth, deepest), warps, stages, swap)
            held = stages * tile.depth * (block * (1 if kind.x else 2) + cut * halves * kind.bits // 8)
            if held <= 220 << 10:
                yield tile


def _tiles(kind: ProductKind, most: int) -> list[tuple[tuple[int, ...], bool]]:
    """Rows, columns (with a gate of both halves), depth, warps and stages, and whether W is on the left."""
    if most > 128:
        many = MANY_INTEGERS if kind.x else MANY
        return [(cut, swap) for cut in many for swap in ((True,) if kind.bits < 16 and not kind.x else (True, False))]
    if kind.bits < 16:
        tiles = [(cut, True) for cut in INTEGERS] + (
            [(cut, False) for cut in (INTEGERS[:12] if kind.x else DEQUANTIZED)]
        )
    else:
        tiles = [(cut, False) for cut in FEW] + [(cut, True) for cut in FEW_SWAPPED]
        if most <= 64:
            return [((64, *cut), False) for cut in FILLED] + [((most, *cut), swap) for cut, swap in tiles]
    return [((most, *cut), swap) for cut, swap in tiles]


class Compilers:
    """Compiles sources in as many processes as there are cores, in the order given; what can't be compiled is left out."""

    def __init__(self, sources: list[KernelSource], architecture: int) -> None:
        self.done: queue.SimpleQueue[tuple[int, Kernel | None]] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        limit = compiling.SHARED_LIMITS[architecture] << 10
        for n, source in enumerate(sources):
            self._jobs.put((n, json.dumps({**asdict(source), "architecture": architecture, "shared_limit": limit})))
        self._compilers: list[Any] = []
        for _ in range(min(len(sources), len(os.sched_getaffinity(0)))):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        compiler = compiling._Compiler()
        self._compilers.append(compiler)
        while True:
            try:
                n, job = self._jobs.get_nowait()
            except queue.Empty:
                return
            kernel = None
            try:
                kernel = compiler.compile(job)
            except Exception as problem:
                print(f"left out: {str(problem)[:200]}", flush=True)
                if compiler._process.poll() is not None:  # it died of this one
                    compiler = compiling._Compiler()
                    self._compilers.append(compiler)
            self.done.put((n, kernel))

    def stop(self) -> None:
        while True:
            try:
                self._jobs.get_nowait()
            except queue.Empty:
                break
        for compiler in self._compilers:
            with suppress(Exception):
                compiler._process.kill()
