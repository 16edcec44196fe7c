"""What a quantized KV cache holds: keys and values divided by their scales and rounded to a few bits. The definition, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RANGES = {"int8": (-128, 127), "int4": (-8, 7), "float8_e4m3fn": (-448, 448)}
"""The numbers that each type can hold; a scale is the largest number of a cache divided by the second of these."""
BITS = {"int4": 4, "int8": 8, "float8_e4m3fn": 8, "float16": 16, "bfloat16": 16, "float32": 32}
"""Bits of a number in a cache, by the cache's type."""


def per_channel(scale: Any, kv_heads: int, head_dim: int) -> NDArray[np.float32]:
    """One scale for all, one a head [kv_heads] or one a channel [kv_heads, head_dim], as [kv_heads, head_dim]."""
    given = np.asarray(scale, np.float32)
    return np.broadcast_to(given[:, None] if given.ndim == 1 else given, (kv_heads, head_dim))


def quantize(x: NDArray[Any], scale: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """x [..., kv_heads, head_dim] as numbers of `dtype` (int8, int4, float8_e4m3fn), to nearest, ties to even; what is beyond
    its range is held at the range's end. scale: as `per_channel` gives."""
    low, high = RANGES[np.dtype(dtype).name]
    scaled = np.clip(x.astype(np.float32) / scale, low, high)
    narrow: NDArray[Any] = (np.rint(scaled) if high < 448 else scaled).astype(dtype)
    return narrow


def dequantize(values: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `values` [..., kv_heads, head_dim] stand for."""
    wide: NDArray[np.float32] = values.astype(np.float32) * scale
    return wide
