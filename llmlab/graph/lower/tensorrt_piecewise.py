"""A lowered graph cut at attention: parts that TensorRT compiles, and what runs between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import get_args

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.cut import cut
from llmlab.graph.edit import Dim, Editor, operand
from llmlab.graph.lower.tensorrt_parts import Attend, Dense, Lowered, Rows, Tensor, View
from llmlab.graph.lower.views import columns
from llmlab.graph.pieces import Piece
from llmlab.graph.store.storage import array

TABLES = {8: "cos", 9: "sin", 10: "alibi_slopes", 11: "sinks", 12: "k_scale", 13: "v_scale"}
"""The inputs of PagedAttention that are the same in every step."""


def cut_at_attention(edit: Editor, weak_type: str | None, wide: Collection[str], keep_fp32: Collection[str]) -> Lowered:
    """`lower` with piecewise hosting, from a graph in operators that TensorRT has; `edit`'s graph is changed.

    wide: names of the nodes whose results stay float32 when they cross from part to part under weak typing.
    """
    attention = [n for n in edit.surgeon.nodes if n.op == "PagedAttention"]
    views, tables = {}, _Tables()
    for node in attention:
        found = [columns(t) for t in node.inputs[:3]]
        views[node.name] = [View(c.tensor.name, c.offset) for c in found]
        node.inputs = [*(c.tensor for c in found), *node.inputs[3:]]
    edit.surgeon.cleanup()
    makers = {t.name: n for n in edit.surgeon.nodes for t in n.outputs}
    handed = {t.name for n in attention for t in (*n.inputs[:3], n.outputs[0])}
    result = cut(edit.graph, lambda node: node.op == "PagedAttention")
    tensors: dict[str, Tensor] = {}
    for crossing in result.crossings:
        narrow = crossing.name in handed or makers[crossing.name].name not in wide
        dtype = weak_type if weak_type is not None and crossing.dtype == "float32" and narrow else crossing.dtype
        tensors[crossing.name] = _tensor(crossing.name, dtype, crossing.shape)
    logits = next(t for t in edit.surgeon.outputs if t.name == "logits")
    tensors["logits"] = _tensor("logits", "float32", logits.shape)
    parts = [
        _attend(piece, views[piece.name], tables) if piece.marked else _dense(piece, keep_fp32)
        for piece in result.pieces
    ]
    return Lowered(tuple(parts), tensors, tables.arrays)


def _dense(piece: Piece, keep_fp32: Collection[str]) -> Dense:
    computed = (n for n in piece.graph.surgeon.nodes if all(t.dtype == np.float32 for t in n.outputs))
    kept = tuple(n.name for n in computed if n.name in keep_fp32)
    return Dense(piece.name, piece.graph, piece.key, kept)


def _attend(piece: Piece, views: list[View], tables: _Tables) -> Attend:
    (node,) = piece.graph.surgeon.nodes
    attrs = node.attrs
    return Attend(
        name=node.name,
        layer=int(node.inputs[3].name.rpartition(".")[2]),
        q=views[0],
        k=views[1],
        v=views[2],
        out=node.outputs[0].name,
        num_heads=attrs["num_heads"],
        kv_heads=attrs["kv_num_heads"],
        head_dim=attrs["head_dim"],
        scale=float(attrs["scale"]),
        window=attrs["window"],
        softcap=float(attrs["softcap"]),
        interleaved=bool(attrs["interleaved"]),
        tables={what: tables.name(node, t) for i, what in TABLES.items() if (t := operand(node, i)) is not None},
    )


class _Tables:
    """The float32 arrays that attention reads, each once under the name of its constant."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def name(self, node: gs.Node, tensor: gs.Tensor) -> str:
        if not isinstance(tensor, gs.Constant):
            raise UnsupportedModelError(f"{node.name}: {tensor.name} is computed in the step; expected a constant")
        if tensor.name not in self.arrays:
            self.arrays[tensor.name] = np.ascontiguousarray(array(tensor), np.float32)
        return tensor.name


def _tensor(name: str, dtype: str, shape: Sequence[Dim] | None) -> Tensor:
    rows, width, *more = [*(shape or [None]), 0]  # a number a row has no width
    for known in get_args(Rows):
        if rows == known and isinstance(width, int) and not any(more):
            return Tensor(dtype, width, known)
    raise UnsupportedModelError(
        f"{name} {shape} crosses from part to part; expected rows of the step's tokens, and their width"
    )
