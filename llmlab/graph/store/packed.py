"""Numbers of four bits: two lie in a byte, the first in its low half, as ONNX stores them. NumPy gives a byte to each."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_FOUR_BITS = frozenset(np.dtype(t) for t in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn))


def is_packed(dtype: np.dtype) -> bool:
    """Whether ONNX stores two numbers of this type in a byte."""
    return np.dtype(dtype) in _FOUR_BITS


def stored_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array as ONNX stores it."""
    count = int(np.prod(shape, dtype=np.int64))
    return -(-count // 2) if is_packed(dtype) else count * np.dtype(dtype).itemsize


def pack(values: np.ndarray) -> np.ndarray:
    """Four-bit numbers of any shape → uint8 [ceil(count / 2)]; what is left of a last byte is zero."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    packed = bits[::2] & 15
    packed[: bits.size // 2] |= bits[1::2] << 4
    return packed


def unpack(packed: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What `pack` was given: an array of `shape` in a four-bit type."""
    bits = np.empty(2 * packed.size, np.uint8)
    np.bitwise_and(packed, 15, out=bits[::2])
    np.right_shift(packed, 4, out=bits[1::2])
    return bits[: int(np.prod(shape, dtype=np.int64))].view(dtype).reshape(shape)
