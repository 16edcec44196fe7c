"""How products are cut: what was fastest on an H200 for Llama's sizes (`benchmarks/gpu_products.py --tune`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vector:
    """`product_rows`: each program has some columns of out, for up to 4 rows, without tensor cores."""

    rows: int
    columns: int
    warps: int
    unroll: int = 1
    """Times 16 bytes that a thread reads of each row of W at once."""


@dataclass(frozen=True)
class Tile:
    """`product_tiles`: each program has rows x columns of out, `depth` columns of x at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    """W's tile is the left side of the product that the tensor cores see, so that few rows don't leave them idle."""


ROW_CLASSES = (1, 2, 4, 16, 32, 64, 128, 256, 512, 1 << 30)
_MANY = 1 << 30
_Cut = Vector | Tile

# Up to so many rows: the cut where columns are few (up to 8192; thin tiles, so that every multiprocessor has one), where they
# are many, and with a gate (columns of out; W has twice as many). Weights of 8 or 4 bits are made wide where rows are more.
CUTS: dict[str, dict[int, tuple[_Cut, _Cut, _Cut]]] = {
    "16 bits": {
        1: (Vector(1, 1, 8, 2), Vector(1, 1, 8, 2), Vector(1, 1, 8)),
        2: (Vector(2, 2, 2), Tile(16, 128, 64, 8, 6, True), Tile(16, 128, 128, 8, 3, True)),
        16: (Tile(16, 64, 64, 4, 8, True), Tile(16, 128, 64, 8, 6, True), Tile(16, 128, 128, 8, 3, True)),
        32: (Tile(32, 16, 256, 2, 4), Tile(32, 64, 128, 4, 4, True), Tile(32, 128, 128, 8, 3, True)),
        64: (Tile(64, 32, 128, 4, 8), Tile(64, 64, 64, 4, 6, True), Tile(64, 64, 64, 4, 4, True)),
        128: (Tile(128, 32, 128, 4, 4), Tile(128, 128, 64, 8, 6, True), Tile(128, 64, 64, 4, 6, True)),
        256: (Tile(128, 64, 64, 4, 5, True), Tile(256, 128, 64, 8, 4, True), Tile(128, 64, 64, 4, 4, True)),
        512: (Tile(128, 128, 64, 4, 4), Tile(128, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4, True)),
        _MANY: (Tile(256, 128, 64, 8, 3, True), Tile(256, 128, 64, 8, 3, True), Tile(128, 128, 64, 8, 4, True)),
    },
    "8 bits": {
        1: (Vector(1, 2, 2), Vector(1, 4, 1), Vector(1, 1, 1)),
        2: (Vector(2, 2, 2), Vector(2, 2, 1), Vector(2, 1, 1)),
        16: (Tile(16, 64, 64, 4, 6, True), Tile(16, 128, 128, 8, 6, True), Tile(16, 128, 128, 8, 6, True)),
        32: (Tile(32, 64, 64, 4, 6, True), Tile(32, 128, 128, 8, 6, True), Tile(32, 128, 128, 8, 4, True)),
        64: (Tile(64, 64, 128, 4, 6, True), Tile(64, 128, 128, 8, 4, True), Tile(64, 128, 128, 8, 4, True)),
        128: (Tile(128, 64, 128, 4, 4, True), Tile(128, 128, 128, 8, 3, True), Tile(128, 128, 64, 8, 3, True)),
    },
    "4 bits": {
        1: (Vector(1, 4, 2), Vector(1, 2, 1), Vector(1, 2, 1)),
        2: (Vector(2, 4, 2), Vector(2, 2, 1), Vector(2, 2, 1)),
        16: (Tile(16, 32, 128, 4, 4, True), Tile(16, 128, 128, 8, 4, True), Tile(16, 128, 128, 8, 4, True)),
        32: (Tile(32, 32, 128, 4, 4, True), Tile(32, 128, 128, 8, 4, True), Tile(32, 128, 128, 8, 4, True)),
        64: (Tile(64, 64, 128, 4, 4, True), Tile(64, 128, 128, 8, 4, True), Tile(64, 128, 128, 8, 3, True)),
        128: (Tile(128, 64, 128, 4, 4, True), Tile(128, 128, 128, 8, 3, True), Tile(128, 128, 64, 8, 3, True)),
    },
    "8 by 8 bits": {
        1: (Vector(1, 2, 2, 2), Vector(1, 1, 1), Vector(1, 1, 1)),
        2: (Vector(2, 2, 2), Vector(2, 1, 1), Vector(2, 1, 1)),
        16: (Tile(16, 64, 256, 4, 4, True), Tile(16, 128, 128, 8, 6, True), Tile(16, 64, 256, 4, 3)),
        32: (Tile(32, 64, 256, 4, 4, True), Tile(32, 128, 128, 8, 6, True), Tile(32, 64, 256, 4, 3, True)),
        64: (Tile(64, 32, 256, 4, 4), Tile(64, 64, 128, 4, 6, True), Tile(64, 32, 128, 4, 4)),
        128: (Tile(128, 32, 256, 4, 4), Tile(128, 128, 128, 8, 4, True), Tile(128, 64, 128, 4, 4, True)),
        512: (Tile(128, 64, 128, 4, 4, True), Tile(256, 128, 128, 8, 3), Tile(128, 64, 128, 4, 4, True)),
        _MANY: (Tile(256, 128, 128, 8, 3), Tile(256, 128, 128, 8, 3), Tile(256, 64, 128, 8, 3)),
    },
}
