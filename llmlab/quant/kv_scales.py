"""Scales of a quantized KV cache: chosen from what keys and values were seen, and put on the serving graph's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.errors import InputError
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.kernels.kv_cache import RANGES, dequantize, quantize

CACHES = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
    "int4": np.dtype(ml_dtypes.int4),
}
"""What a recipe calls the types that a KV cache can have."""
K_SCALE, V_SCALE = 12, 13
"""Inputs of PagedAttention."""
_RATIOS = np.linspace(1.0, 0.4, 25)
"""Of the largest magnitude: ranges that are tried where clipping may be worth its error."""


class Scales(NamedTuple):
    """Of one layer's keys and values, float32: [kv_heads], or [kv_heads, head_dim] where each channel has its own."""

    k: NDArray[np.float32]
    v: NDArray[np.float32]


def scale_of(
    absmax: NDArray[np.float32], dtype: np.dtype, per: str, heads: int, sample: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The scale of keys or of values whose channels were at most `absmax` [heads · head_dim] large.

    per: what shares a scale: `tensor`, `head` ([heads], for tensor all the same) or `channel` ([heads, head_dim]).
    sample [rows, heads · head_dim]: with it, of several ranges up to the largest magnitude the one whose rounding and clipping
    lose least, in squares: worth it in four bits. Channels that were always zero have scale 1.
    """
    by_channel = absmax.astype(np.float32).reshape(heads, -1)
    shared = {"tensor": (0, 1), "head": (1,), "channel": ()}[per]
    most = by_channel.max(shared, keepdims=True)
    scale = np.where(most > 0, most / RANGES[dtype.name][1], 1.0).astype(np.float32)
    if sample is not None and len(sample):
        rows = sample.astype(np.float32).reshape(len(sample), heads, -1)
        lost = []
        for ratio in _RATIOS:
            tried = scale * np.float32(ratio)
            error = (dequantize(quantize(rows, tried, dtype), tried) - rows) ** 2
            lost.append(error.sum(0).sum(shared, keepdims=True))
        scale = (scale * _RATIOS[np.argmin(lost, 0)]).astype(np.float32)
    full = np.broadcast_to(scale, by_channel.shape if per == "channel" else (heads, 1))
    return np.ascontiguousarray(full if per == "channel" else full[:, 0])


def place_scales(graph: Graph, dtype: np.dtype, scales: Sequence[Scales]) -> None:
    """Make the KV cache of each layer, in their order, `dtype` with these scales; the graph is changed.

    Raises InputError for a graph that isn't a serving graph, or whose cache is quantized already.
    """
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    if any(layer.dtype.name in RANGES for layer in graph.kv_layers()):
        raise InputError("the KV cache is quantized already: start from the graph that llmlab.optimize returned")
    edit = Editor(graph)
    nodes = [n for n in graph.surgeon.nodes if n.op == "PagedAttention"]
    for node, given in zip(nodes, scales, strict=True):
        heads, dim = node.attrs["kv_num_heads"], node.attrs["head_dim"]
        pool, inputs = node.inputs[3], list(node.inputs)
        inputs += [gs.Variable.empty()] * (K_SCALE - len(inputs))
        for what, scale in zip("kv", given, strict=True):
            if scale.shape not in ((heads,), (heads, dim)) or not np.isfinite(scale).all() or scale.min() <= 0:
                raise InputError(
                    f"{node.name}: {what}_scale is {scale.shape} from {scale.min()} on; expected positive numbers "
                    f"[{heads}] or [{heads}, {dim}]"
                )
            inputs.append(edit.constant(f"{pool.name}.{what}_scale", np.ascontiguousarray(scale, np.float32)))
        node.inputs = inputs
        pool.dtype = node.outputs[1].dtype = dtype
