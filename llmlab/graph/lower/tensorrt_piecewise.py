"""A lowered graph cut at attention, products and norms: parts that TensorRT compiles, and what runs between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.cut import cut
from llmlab.graph.edit import Dim, Editor, operand
from llmlab.graph.lower.tensorrt_norms import NORM
from llmlab.graph.lower.tensorrt_parts import Attend, Dense, Lowered, Multiply, Normalize, Rows, Tensor, View
from llmlab.graph.lower.tensorrt_products import MULTIPLE, PRODUCT
from llmlab.graph.lower.tensorrt_weights import shared_key, weights_as_inputs
from llmlab.graph.lower.views import columns
from llmlab.graph.pieces import Piece
from llmlab.graph.store.storage import array

TABLES = {8: "cos", 9: "sin", 10: "alibi_slopes", 11: "sinks", 12: "k_scale", 13: "v_scale"}
"""The inputs of PagedAttention that are the same in every step."""
_VIEWS = {"PagedAttention": 3, PRODUCT: 1, NORM: 1}
"""Nodes that kernels run, and how many of their first inputs may be columns of a wider tensor."""


def cut_at_kernels(
    edit: Editor, weak_type: str | None, wide: Collection[str], keep_fp32: Collection[str], products: bool
) -> Lowered:
    """`lower` with piecewise hosting, from a graph in operators that TensorRT has; `edit`'s graph is changed.

    wide: names of the nodes whose results stay float32 when they cross from part to part under weak typing.
    products: the graph has nodes for products and norms, and weights are to lie outside the parts.
    """
    tables = _Tables()
    views = {node.name: _views(node) for node in edit.surgeon.nodes if node.op in _VIEWS}
    edit.surgeon.cleanup()
    weights = weights_as_inputs(edit.surgeon, weak_type, keep_fp32) if products else {}
    makers = {t.name: n for n in edit.surgeon.nodes for t in n.outputs}
    handed = {t.name for n in edit.surgeon.nodes for t in _handed(n)}
    result = cut(edit.graph, lambda node: node.op in _VIEWS)
    tensors: dict[str, Tensor] = {}
    for crossing in result.crossings:
        maker = makers[crossing.name]
        narrow = crossing.name in handed or maker.name not in wide
        if maker.op == PRODUCT:
            dtype = maker.attrs["out_dtype"]
        else:
            dtype = weak_type if weak_type is not None and crossing.dtype == "float32" and narrow else crossing.dtype
        tensors[crossing.name] = _tensor(crossing.name, dtype, crossing.shape)
    logits = next(t for t in edit.surgeon.outputs if t.name == "logits")
    tensors["logits"] = _tensor("logits", "float32", logits.shape)
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    types |= {name: np.dtype(values.dtype).name for name, values in weights.items()}
    parts: list[Dense | Attend | Multiply | Normalize] = []
    for piece in result.pieces:
        op = piece.graph.surgeon.nodes[-1].op
        if not piece.marked:
            parts.append(_dense(piece, keep_fp32, types if products else None))
        elif op == "PagedAttention":
            parts.append(_attend(piece, views[piece.name], tables))
        elif op == PRODUCT:
            parts.append(_multiply(piece, views[piece.name]))
        else:
            parts.append(_normalize(piece, views[piece.name]))
    read = {name for part in parts if not isinstance(part, Attend) for name in _weights_of(part)}
    return Lowered(tuple(parts), tensors, tables.arrays, {n: v for n, v in weights.items() if n in read})


def _views(node: gs.Node) -> list[View]:
    """Where q, k and v, or the rows of a product or norm, lie; the node reads whole tensors from then on."""
    found = [columns(t) for t in node.inputs[: _VIEWS[node.op]]]
    if node.op != "PagedAttention":
        (x,) = found
        if x.offset % MULTIPLE or not isinstance(x.tensor.shape[1], int) or x.tensor.shape[1] % MULTIPLE:
            return [View(node.inputs[0].name)]
    node.inputs = [*(c.tensor for c in found), *node.inputs[len(found) :]]
    return [View(c.tensor.name, c.offset) for c in found]


def _handed(node: gs.Node) -> list[gs.Tensor]:
    """What a kernel reads and gives in the type that the parts hand each other."""
    if node.op == NORM:
        return [node.inputs[0], node.outputs[0]]
    if node.op == PRODUCT:
        added = operand(node, 3)
        return [node.inputs[0], *([] if added is None else [added])]
    return [*node.inputs[:3], node.outputs[0]] if node.op == "PagedAttention" else []


def _weights_of(part: Dense | Multiply | Normalize) -> Sequence[str]:
    if isinstance(part, Dense):
        return part.inputs
    if isinstance(part, Normalize):
        return [part.weight]
    return [name for name in (part.weight, part.bias, part.scale) if name is not None]


def _dense(piece: Piece, keep_fp32: Collection[str], types: Mapping[str, str] | None) -> Dense:
    """types: of what crosses and of weights, where parts of one key share a plan."""
    computed = (n for n in piece.graph.surgeon.nodes if all(t.dtype == np.float32 for t in n.outputs))
    kept = tuple(n.name for n in computed if n.name in keep_fp32)
    key = piece.key
    if types is not None:
        key = shared_key(key, piece.graph.surgeon, [types.get(n, "") for n in (*piece.inputs, *piece.outputs)], kept)
    return Dense(piece.name, piece.graph, key, kept)


def _multiply(piece: Piece, views: list[View]) -> Multiply:
    node = piece.graph.surgeon.nodes[-1]
    x, weight, bias, add, scale = (operand(node, i) for i in range(5))
    assert x is not None and weight is not None
    return Multiply(
        name=node.name,
        x=views[0],
        weight=weight.name,
        out=node.outputs[0].name,
        depth=int(weight.shape[1]) * (2 if node.attrs["weight_dtype"] == "int4" else 1),
        width=int(node.outputs[0].shape[1]),
        weight_dtype=node.attrs["weight_dtype"],
        group=node.attrs["group"],
        rounded=node.attrs["x"],
        scale=None if scale is None else scale.name,
        gate=node.attrs["gate"],
        bias=None if bias is None else bias.name,
        add=None if add is None else add.name,
    )


def _normalize(piece: Piece, views: list[View]) -> Normalize:
    node = piece.graph.surgeon.nodes[-1]
    out, epsilon = node.outputs[0], node.attrs["epsilon"]
    return Normalize(node.name, views[0], node.inputs[1].name, out.name, int(out.shape[1]), epsilon)


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
