"""How large tensors are, as numbers and as text: `float32[T, 384]`, `1.5 kB × T`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.reports.snapshot import kind_of
from llmlab.graph.store.deferred import stored_bytes

_FLOATS = "fV"
_LOW = ("int4", "uint4", "int8", "uint8", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16")


def number_text(count: float, unit: str = "") -> str:
    """`1.5 k`, `16.9 M`, `0.031`: three digits."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".rstrip()


def bytes_text(count: float) -> str:
    """`16.9 MB`"""
    return number_text(count, "B")


def time_text(seconds: float) -> str:
    """`1.52 ms`, `310 µs`"""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def tensor_bytes(tensor: gs.Tensor) -> str:
    """Bytes of a tensor, as a product with the sizes that aren't known before the run; empty where nothing is known."""
    if isinstance(tensor, gs.Constant):
        return bytes_text(tensor._values.nbytes)
    if tensor.shape is None or tensor.dtype is None or isinstance(tensor.dtype, int):
        return ""
    sizes = [d for d in tensor.shape if isinstance(d, int)]
    names = [str(d) for d in tensor.shape if not isinstance(d, int)]
    one = stored_bytes(tuple(sizes), np.dtype(tensor.dtype))
    return " × ".join([bytes_text(one), *names])


def kind_and_bytes(tensor: gs.Tensor) -> str:
    """`float32[T, 384] · 1.54 kB × T`"""
    size = tensor_bytes(tensor)
    return f"{kind_of(tensor)} · {size}" if size else kind_of(tensor)


def type_of(tensor: gs.Tensor) -> str:
    """`float32`; `?` where it isn't known."""
    return kind_of(tensor).partition("[")[0]


def is_weight(constant: gs.Constant) -> bool:
    """Whether a constant holds numbers of the model, and not a shape, an index or a single number."""
    dtype = np.dtype(constant.dtype)
    real = dtype.kind in _FLOATS or dtype.name in _LOW
    return real and int(np.prod(constant.shape, dtype=np.int64)) > 1


def parameters(node: gs.Node, constant: gs.Constant) -> int:
    """How many parameters a constant that `node` reads holds: scales, zero points and tables of RoPE are none."""
    if not is_weight(constant) or constant.name.startswith("rope."):
        return 0
    if node.op in ("DequantizeLinear", "QuantizeLinear") and node.inputs[0] is not constant:
        return 0
    return int(np.prod(constant.shape, dtype=np.int64))
