"""A graph in half precision for a target that computes in float32: the same roundings, in wider numbers."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, is_bfloat16, scope
from llmlab.graph.narrow import Narrowed
from llmlab.graph.store.storage import onnx_dtype

_WIDE = np.dtype(np.float32)
_LAYOUT = frozenset(
    ("Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
"""They give numbers that they were given."""
_EXACT = _LAYOUT | {"DequantizeLinear"}
"""What these give isn't rounded. Numbers of few bits times their scale never are where they are read, by kernels."""


def round_in_float32(edit: Editor) -> None:
    """Let what computes in float16 or bfloat16 compute in float32, and round its result to that type; in place.

    Weights are the rounded ones, in float32. Pools of the KV cache keep their type: that of the numbers to be kept.
    A graph in float32 stays as it is.
    """
    attention = [n for n in edit.surgeon.nodes if n.op == "PagedAttention"]
    if not any(_is_half(n.outputs[0]) for n in attention):
        return
    pools = {id(t) for n in attention for t in (n.inputs[3], n.outputs[1])}
    made: dict[int, gs.Tensor] = {}
    live = [n for n in edit.surgeon.nodes if not n.inputs or not all(constant_expression(t) for t in n.inputs)]
    for node in live:
        for i, tensor in enumerate(node.inputs):
            if _is_half(tensor) and constant_expression(tensor):
                node.inputs[i] = _wide_constant(edit, tensor, made)
    for node in live:
        for out in list(node.outputs):
            if _is_half(out) and id(out) not in pools:
                _round(edit, node, out)


def _round(edit: Editor, node: gs.Node, out: gs.Variable) -> None:
    """The result of a node becomes float32, with the numbers that it had in its own type."""
    half = np.dtype(out.dtype)
    if node.op in _EXACT:
        out.dtype = _WIDE
        return
    readers, low = list(out.outputs), out
    if node.op != "Cast":
        out.dtype = _WIDE
        low = edit.add("Cast", scope(node), [out], {"to": onnx_dtype(half)}, dtype=half, shape=out.shape)
    back = edit.add("Cast", scope(node), [low], {"to": onnx_dtype(_WIDE)}, dtype=_WIDE, shape=out.shape)
    edit.replace(out, back, only=readers)


def _wide_constant(edit: Editor, tensor: gs.Tensor, made: dict[int, gs.Tensor]) -> gs.Tensor:
    """A constant expression in float32; what it is made of has the same numbers as before."""
    if id(tensor) not in made:
        node = None if isinstance(tensor, gs.Constant) else tensor.inputs[0]
        if node is None:
            wide: gs.Tensor = gs.Constant(edit.name(f"{tensor.name}.wide"), Narrowed(tensor, _WIDE))
        elif node.op in _EXACT:
            node.inputs = [_wide_constant(edit, t, made) if _is_half(t) else t for t in node.inputs]
            wide = tensor
            wide.dtype = _WIDE
        else:
            to = {"to": onnx_dtype(_WIDE)}
            wide = edit.add("Cast", scope(node), [tensor], to, dtype=_WIDE, shape=tensor.shape)
        made[id(tensor)] = wide
    return made[id(tensor)]


def _is_half(tensor: gs.Tensor) -> bool:
    if tensor.dtype is None:
        return False
    return is_bfloat16(tensor) or tensor.dtype == np.float16
