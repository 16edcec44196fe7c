"""Token ids, positions and row numbers as int32: what accelerators index with."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand, scope, sort_nodes
from llmlab.graph.store.storage import array, onnx_dtype

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_MOST = np.iinfo(np.int32).max

# Operators whose inputs and outputs share one type, and which of their inputs do (None: all).
_SHARED: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("Abs", "Add", "Clip", "Concat", "Div", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "Sub")),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    **dict.fromkeys(
        ("Expand", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"), (0,)
    ),
    "Gather": (0,),
    "Where": (1, 2),
}
_ANY = frozenset(("Cast", "PagedAttention", "Shape"))  # take either type; what they give doesn't depend on it


def int32_inputs(edit: Editor) -> None:
    """Make every int64 input of the graph int32, in place, and the arithmetic on it too; what can't be int32 reads a Cast."""
    narrow = {id(t): t for t in edit.surgeon.inputs if t.dtype == _INT64}
    for tensor in narrow.values():
        tensor.dtype = _INT32
    for node in list(sort_nodes(edit.surgeon).nodes):
        found = [i for i, t in enumerate(node.inputs) if id(t) in narrow]
        if not found or node.op in _ANY or (node.op == "Gather" and found == [1]):
            continue
        shared = _shared(node)
        if set(found) & set(shared) and all(_fits(node.inputs[i]) for i in shared):
            for i in shared:
                node.inputs[i] = _cast(edit, node, node.inputs[i], _INT32)
            for out in node.outputs:
                if out.dtype == _INT64:
                    out.dtype = _INT32
                    narrow[id(out)] = out
            found = [i for i in found if i not in shared]
        for i in found:
            node.inputs[i] = _cast(edit, node, node.inputs[i], _INT64)


def _shared(node: gs.Node) -> list[int]:
    """The inputs of `node` that have to have one type."""
    if node.op not in _SHARED:
        return []
    places = _SHARED[node.op]
    return [i for i in (range(len(node.inputs)) if places is None else places) if operand(node, i) is not None]


def _fits(tensor: gs.Tensor) -> bool:
    return not isinstance(tensor, gs.Constant) or bool(np.abs(array(tensor)).max(initial=0) <= _MOST)


def _cast(edit: Editor, node: gs.Node, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, gs.Constant):
        return edit.constant(f"{tensor.name}.{dtype}", array(tensor).astype(dtype))
    return edit.add("Cast", scope(node), [tensor], {"to": onnx_dtype(dtype)}, dtype=dtype, shape=tensor.shape)
