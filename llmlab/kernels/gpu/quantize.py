"""Rows of activations as int8: one scale a row, from its largest value, or one for all that was given."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import start_early

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: a float of 23 bits that is added to it loses its fraction, half to even


@triton.jit
def quantize_rows(
    values,  # i8 [rows, depth]
    scale,  # f32 [rows]: x is about values · scale
    x,  # [rows, depth], rows `x_stride` elements apart
    given,  # f32 [1], the scale of all rows; read where STATIC
    depth,
    x_stride,
    BLOCK: tl.constexpr,  # power of two, at least depth
    STATIC: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (rows). A row of zeros has scale 1; one that holds NaN or infinity has NaN."""
    start_early(EARLY)
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row.to(tl.int64) * x_stride + at, mask=at < depth, other=0.0).to(tl.float32)
    if STATIC:
        s = tl.load(given) + 0 * tl.sum(line, 0)
    else:
        s = tl.max(tl.abs(line), 0) * (1 / 127)
        s = tl.where(s == 0, 1.0, s) + 0 * tl.sum(line, 0)
    whole = (tl.div_rn(line, s) + ROUND) - ROUND  # rounded as NumPy divides, so that no number lands one off
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    tl.store(values + row.to(tl.int64) * depth + at, whole.to(tl.int8), mask=at < depth)
    tl.store(scale + row, s)
