"""Rows of activations as int8: one scale a row, from its largest value, or one for all that was given."""

from __future__ import annotations

from llmlab.errors import require

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
):
    """Grid (rows). A row of nothing above 1e-30 has scale 1; one that holds NaN or infinity has NaN."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    line = tl.load(x + row.to(tl.int64) * x_stride + at, mask=at < depth, other=0.0).to(tl.float32)
    if STATIC:
        s = tl.load(given) + 0 * tl.sum(line, 0)
    else:
        most = tl.max(tl.abs(line), 0)
        s = tl.where(most < 1e-30, 1.0, tl.div_rn(most, 127.0)) + 0 * tl.sum(line, 0)
    inverse = tl.div_rn(1.0, s)
    near = line * inverse
    exact = tl.fma(
        tl.fma(-near, s, line), inverse, near
    )  # line / s as it is rounded (Markstein 1990), in three operations
    whole = (exact + ROUND) - ROUND
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    tl.store(values + row.to(tl.int64) * depth + at, whole.to(tl.int8), mask=at < depth)
    tl.store(scale + row, s)
