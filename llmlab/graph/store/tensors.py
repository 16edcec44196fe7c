"""Tensors in a protobuf: their types, how many bytes they ask for, and whether those are there."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from llmlab.files import DIM_LIMIT, RANK_LIMIT

_TYPED_DATA = {  # the field that holds a tensor's values where raw_data doesn't
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}


def tensor_dtype(tensor: TensorProto) -> np.dtype:
    """NumPy's type of a tensor. KeyError for one that ONNX doesn't know."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def tensor_bytes(tensor: TensorProto) -> int:
    """The bytes its declared shape asks for, in Python's integers: an absurd shape can't overflow."""
    bits = 4 if tensor.data_type in _FOUR_BITS else 2 if tensor.data_type in _TWO_BITS else 0
    size = bits or 8 * tensor_dtype(tensor).itemsize
    for dim in tensor.dims:
        size *= dim
    return -(-size // 8)


def _types(*names: str) -> frozenset[int]:
    return frozenset(number for name, number in TensorProto.DataType.items() if name in names)


_FOUR_BITS = _types("INT4", "UINT4", "FLOAT4E2M1")
_TWO_BITS = _types("INT2", "UINT2")
_COMPLEX = _types("COMPLEX64", "COMPLEX128")


def misfit(tensor: TensorProto) -> str | None:
    """What is wrong with the declared type and shape or with the bytes that are there, if anything is. External data is the
    loader's to check."""
    try:
        tensor_dtype(tensor)
    except KeyError:
        return f"has type {tensor.data_type}, which ONNX doesn't know"
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED) or tensor.HasField("segment"):
        return "is of a kind that a language model has no use for"
    if len(tensor.dims) > RANK_LIMIT or any(not 0 <= d <= DIM_LIMIT for d in tensor.dims):
        return f"has an absurd shape {list(tensor.dims)[:RANK_LIMIT]}"
    if tensor.data_location == TensorProto.EXTERNAL:
        return None
    wanted = tensor_bytes(tensor)
    if tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
    else:
        count = len(getattr(tensor, _TYPED_DATA.get(tensor.data_type, "int32_data")))
        elements = int(np.prod(tensor.dims, dtype=object))
        packed = -(-elements * (4 if tensor.data_type in _FOUR_BITS else 2) // 8)
        per = packed if tensor.data_type in _FOUR_BITS | _TWO_BITS else elements
        per *= 2 if tensor.data_type in _COMPLEX else 1
        found = wanted if count == per else -1
    if found == wanted:
        return None
    return f"of shape {list(tensor.dims)} needs {wanted} bytes, and its data has another size: truncated or altered"
