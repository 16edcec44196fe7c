"""Floating-point operations of one token: products and attention; what works element by element isn't counted.

A product of [.., M, K] and [.., K, N] takes 2·M·K·N. Sizes that aren't numbers are, in a step of one token: 1 where they count
batch, tokens or rows, and the context where they count keys: the columns of attention's scores, and what the product with the
values sums over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_graphsurgeon as gs


def flops(node: gs.Node, context: int) -> float:
    """Of one node for one token that attends to `context` keys, itself included; 0 for operators that aren't counted."""
    count = _COUNTED.get(node.op)
    try:
        return float(count(node, context)) if count is not None else 0.0
    except (KeyError, IndexError, TypeError):  # a shape or an attribute that isn't known
        return 0.0


def _product(node: gs.Node, context: int) -> float:
    left, right, out = (list(t.shape) for t in (node.inputs[0], node.inputs[1], node.outputs[0]))
    inner = left[-1] if isinstance(left[-1], int) else right[-2] if len(right) > 1 else right[-1]
    depth = _keys(inner, context)
    columns = _keys(out[-1], context) if len(right) > 1 else 1
    rows = out[:-1] if len(right) > 1 else out
    return 2 * _count(rows) * depth * columns


def _gemm(node: gs.Node, context: int) -> float:
    left, out = list(node.inputs[0].shape), list(node.outputs[0].shape)
    return 2 * _count(out) * _keys(left[0 if node.attrs.get("transA") else 1], context)


def _few_bits(node: gs.Node, context: int) -> float:
    return 2 * _count(list(node.outputs[0].shape)[:-1]) * node.attrs["K"] * node.attrs["N"]


def _paged(node: gs.Node, context: int) -> float:
    attrs = node.attrs
    window = attrs.get("window", attrs.get("local_window_size", 0))
    heads = attrs["num_heads"]
    dim = attrs.get("head_dim") or list(node.outputs[0].shape)[-1] / heads
    keys = min(context, window) if window > 0 else context
    return 4 * heads * dim * keys


def _attention(node: gs.Node, context: int) -> float:
    """ONNX's Attention, of [batch, heads, tokens, dim], or [batch, tokens, heads · dim]; values may have another dim."""
    query, value = list(node.inputs[0].shape), list(node.inputs[2].shape)
    if len(query) == 4:
        return 2 * query[1] * (query[3] + value[3]) * context
    heads = node.attrs["q_num_heads"]
    return 2 * (query[2] + heads * value[2] / node.attrs["kv_num_heads"]) * context


def _experts(node: gs.Node, context: int) -> float:
    chosen = list(node.inputs[1].shape)[-1]
    sizes = [math.prod(list(t.shape)[1:]) for t in (node.inputs[3], node.inputs[4])]
    return 2 * chosen * sum(sizes)


def _keys(size: Any, context: int) -> int:
    return size if isinstance(size, int) else context


def _count(sizes: Sequence[Any]) -> int:
    return math.prod(d for d in sizes if isinstance(d, int))


_COUNTED: dict[str, Callable[[gs.Node, int], float]] = {
    "MatMul": _product,
    "FusedMatMul": _product,
    "Gemm": _gemm,
    "MatMulNBits": _few_bits,
    "Attention": _attention,
    "PagedAttention": _paged,
    "GroupQueryAttention": _paged,
    "MixtureOfExperts": _experts,
}
COUNTED = tuple(_COUNTED)
"""Operators that are counted."""
