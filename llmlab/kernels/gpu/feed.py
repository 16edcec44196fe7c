"""Tokens that stay on the GPU: a step's inputs that the step before sampled."""

from __future__ import annotations

from llmlab.errors import require

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def feed_tokens(ids, previous, count, BLOCK: tl.constexpr):
    """Where `ids` [count] holds -1 - j, put previous[j] there; 0 where that is no token."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(ids + at, mask=at < count, other=0)
    token = tl.load(previous + (-1 - given), mask=given < 0, other=0)
    tl.store(ids + at, tl.maximum(token, 0), mask=given < 0)
