"""Weights outside of the parts that read them: inputs, so that parts which differ in weights alone are one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.lower.tensorrt_norms import NORM
from llmlab.graph.lower.tensorrt_products import PRODUCT
from llmlab.graph.narrow import Narrowed
from llmlab.graph.store.lazy import Values
from llmlab.graph.store.storage import array, constants

_FLOATS = ("float16", "bfloat16", "float32")
_INSIDE = frozenset(("DequantizeLinear", "PagedAttention", "QuantizeLinear"))
"""Operators whose constants stay: a compiler wants to know them, or a kernel's host has a place of its own for them."""
_BY_VALUE = 1 << 20  # bytes


def weights_as_inputs(surgeon: gs.Graph, weak_type: str | None, keep_fp32: Collection[str]) -> dict[str, Values]:
    """Make inputs of all that products and norms read and of the float constants with several values elsewhere, in place, and return
    their values by name. Under weak typing standard operators go on reading float32, whatever is stored: what a norm or a
    node in `keep_fp32` reads as it is, else `weak_type`."""
    found: dict[str, Values] = {}
    for tensor in constants(surgeon):
        kernel = any(n.op in (PRODUCT, NORM) for n in tensor.outputs)
        if any(n.op in _INSIDE for n in tensor.outputs) or not (kernel or _is_weight(tensor)):
            continue
        found[tensor.name] = _stored(tensor, weak_type, keep_fp32)
        dtype = np.dtype(np.float32) if weak_type is not None else tensor.dtype
        variable = gs.Variable(tensor.name, dtype, list(tensor.shape))
        for reader in list(tensor.outputs):
            reader.inputs = [variable if t is tensor else t for t in reader.inputs]
        surgeon.inputs.append(variable)
    return found


def _is_weight(tensor: gs.Constant) -> bool:
    return np.dtype(tensor.dtype).name in _FLOATS and int(np.prod(tensor.shape, dtype=np.int64)) > 1


def _stored(tensor: gs.Constant, weak_type: str | None, keep_fp32: Collection[str]) -> Values:
    wide = tensor.dtype == np.float32 and any(n.op == NORM or n.name in keep_fp32 for n in tensor.outputs)
    narrows = np.dtype(tensor.dtype).name in _FLOATS
    if weak_type is None or wide or not narrows or tensor.dtype == np.dtype(weak_type):
        return tensor._values
    return Narrowed(tensor, np.dtype(weak_type))


def shared_key(key: str, graph: gs.Graph, types: Collection[str], kept: Collection[str]) -> str:
    """A piece's key, for pieces whose plans may serve each other: the types of what they read and give, which nodes stay in
    float32, and the values of the constants that are left count too (large ones are taken to differ)."""
    digest = hashlib.sha256(repr((key, list(types))).encode())
    for i, node in enumerate(graph.nodes):
        digest.update(f"{i}:{node.name in kept};".encode())
        for tensor in (t for t in node.inputs if isinstance(t, gs.Constant)):
            small = tensor._values.nbytes <= _BY_VALUE
            digest.update(np.ascontiguousarray(array(tensor)).view(np.uint8).data if small else tensor.name.encode())
    return digest.hexdigest()[:16]
