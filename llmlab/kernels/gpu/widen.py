"""A weight of 8 or 4 bits as one of 16: what products of many rows multiply."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import start_early
from llmlab.kernels.gpu.words import unpacked

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def widen_weight(
    wide,  # [outputs, depth] of 16 bits
    weight,  # i16 [outputs, depth · BITS / 16]
    scale,  # f16 [outputs, depth / GROUP]; read where GROUP
    depth,
    BLOCK: tl.constexpr,  # columns that a program has; a power of two
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (outputs, depth / BLOCK). With groups each value is rounded once, after its scale; without, `wide` holds the integers."""
    start_early(EARLY)
    PLACES: tl.constexpr = 16 // BITS  # values a word, 8 columns apart
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * (BLOCK // PLACES) + tl.arange(0, BLOCK // PLACES)
    column = word // 8 * (8 * PLACES) + word % 8
    inside = column < depth
    length = depth // (8 * PLACES) * 8
    words = tl.load(weight + row * length + word, mask=inside, other=0, eviction_policy="evict_first")
    tiles = unpacked(words, BITS, DTYPE)
    if GROUP > 0:  # the columns of a word are in one
        s = tl.load(scale + row * (depth // GROUP) + column // GROUP, mask=inside, other=0.0).to(tl.float32)
    for n in tl.static_range(PLACES):
        value = tiles[n]
        if GROUP > 0:
            value = (value.to(tl.float32) * s).to(wide.dtype.element_ty)
        tl.store(wide + row * depth + column + 8 * n, value, mask=inside)
