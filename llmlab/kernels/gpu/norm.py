"""RMS normalization of rows, from one read of them. Sums are float32."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import start_early

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def rms_norm(
    out,  # [rows, width]
    x,  # [rows, width], rows `x_stride` elements apart
    weight,  # [width]
    epsilon,  # f32
    width,
    x_stride,
    WIDTH_PAD: tl.constexpr,  # width rounded up to a power of two
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (rows,): out = x / sqrt(mean(x²) + epsilon) · weight."""
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH_PAD)
    inside = at < width
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value * value, 0) / width
    tl.store(out + row * width + at, (value / tl.sqrt(mean + epsilon) * factor).to(out.dtype.element_ty), mask=inside)
