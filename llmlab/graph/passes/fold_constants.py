"""Everything that is known before any token arrives is computed now. Weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.bounded import CannotEvaluate
from llmlab.graph.analysis.evaluate import excerpt
from llmlab.graph.edit import (
    Editor,
    ancestors,
    inline_constants,
    ints,
    is_bfloat16,
    operand,
    producer,
    sort_nodes,
    value,
)
from llmlab.graph.rewrite import Match, Pass

_LARGE = 1 << 17  # bytes


class FoldConstants(Pass):
    """Compute what depends on constants alone; weight matrices are left to the target."""

    name = "fold_constants"

    def find(self, edit: Editor) -> Iterator[Match]:
        foldable = [
            n
            for n in edit.surgeon.nodes
            if n.op == "Constant"
            or (n.inputs and _all_constant(n))
            or _known_size(n) is not None
            or _like(n) is not None
        ]
        if foldable:
            yield Match(node=foldable[0])

    def rewrite(self, edit: Editor, match: Match) -> None:
        inline_constants(edit.surgeon)
        _inline_sizes(edit)
        _inline_types(edit)
        sort_nodes(edit.surgeon)
        for tensor, array in _values(edit, _foldable(edit.surgeon)):
            tensor.inputs.clear()
            tensor.to_constant(array)
        if any(n.op == "If" and isinstance(n.inputs[0], gs.Constant) for n in edit.surgeon.nodes):
            # Nothing else is left to the surgeon: what it folds, it computes whatever the size.
            edit.surgeon.fold_constants(
                fold_shapes=False,
                recurse_subgraphs=False,
                recurse_functions=False,
                should_exclude_node=lambda node: True,
            )


def _foldable(surgeon: gs.Graph) -> list[gs.Node]:
    """Sorted nodes that depend on constants alone, and on no weight."""
    found: dict[int, gs.Node] = {}
    for node in surgeon.nodes:
        sources = [t for t in node.inputs if not t.is_empty()]
        known = all(isinstance(t, gs.Constant) or (t.inputs and id(t.inputs[0]) in found) for t in sources)
        if sources and known and not _stays(node) and _computable(node):
            found[id(node)] = node
    return list(found.values())


def _computable(node: gs.Node) -> bool:
    standard = not node.domain and not node.op.startswith(("Random", "Multinomial", "Bernoulli"))
    types = all(t.dtype is None or np.dtype(t.dtype).kind in "iufb" for t in (*node.inputs, *node.outputs) if t.name)
    return standard and types and not any(isinstance(v, gs.Graph) for v in node.attrs.values())


def _values(edit: Editor, nodes: list[gs.Node]) -> list[tuple[gs.Variable, np.ndarray]]:
    """What leaves the foldable part, computed together; where that fails, each by itself, and what can't be stays."""
    inside = {id(n) for n in nodes}
    wanted = [
        t
        for n in nodes
        for t in n.outputs
        if not edit.is_output(t) and any(id(reader) not in inside for reader in t.outputs)
    ]
    if not wanted:
        return []
    arrays: list[np.ndarray | None]
    try:
        arrays = [*excerpt(nodes, wanted, []).run({})]
    except CannotEvaluate:
        arrays = [_alone(tensor) for tensor in wanted]
    return [(t, a) for t, a in zip(wanted, arrays, strict=True) if a is not None and a.nbytes <= _LARGE]


def _alone(tensor: gs.Variable) -> np.ndarray | None:
    try:
        return excerpt(ancestors(tensor)[0], [tensor], []).run({})[0]
    except CannotEvaluate:
        return None


def _all_constant(node: gs.Node) -> bool:
    return all(isinstance(t, gs.Constant) for t in node.inputs) and not _stays(node)


def _stays(node: gs.Node) -> bool:
    return _reads_weight(node) or any(is_bfloat16(t) for t in (*node.inputs, *node.outputs))


def _known_size(node: gs.Node) -> np.ndarray | None:
    """What a Shape node gives, or a Slice or Gather of one, if the axes that it asks for have known sizes."""
    if node.op not in ("Shape", "Slice", "Gather"):
        return None
    sizes: np.ndarray | None
    if node.op == "Shape":
        sizes = _sizes(node)
    else:
        shape = producer(node.inputs[0], "Shape")
        sizes = None if shape is None else _sizes(shape)
        if sizes is not None:
            sizes = _sliced(sizes, node) if node.op == "Slice" else _gathered(sizes, node)
    known = sizes is not None and sizes.size and all(isinstance(n, int) for n in sizes.reshape(-1))
    return np.asarray(sizes, np.int64) if known else None


def _sizes(shape: gs.Node) -> np.ndarray | None:
    """The sizes that a Shape node gives, known or not, as objects."""
    dims = shape.inputs[0].shape
    return None if dims is None else np.array(dims[shape.attrs.get("start", 0) : shape.attrs.get("end")], object)


def _sliced(sizes: np.ndarray, node: gs.Node) -> np.ndarray | None:
    starts, ends, steps = (ints(operand(node, i)) for i in (1, 2, 4))
    if starts is None or ends is None or len(starts) != 1 or (operand(node, 4) is not None and steps != [1]):
        return None
    return sizes[starts[0] : ends[0]]  # ONNX clamps as Python does; a vector has no other axis


def _gathered(sizes: np.ndarray, node: gs.Node) -> np.ndarray | None:
    at = value(node.inputs[1])
    inside = at is not None and bool(np.all((at >= -len(sizes)) & (at < len(sizes))))
    return np.asarray(sizes[at], object) if inside else None


def _inline_sizes(edit: Editor) -> None:
    """Shape nodes of known sizes, and what is taken out of others, become constants."""
    sizes = [(node, found) for node in edit.surgeon.nodes if (found := _known_size(node)) is not None]
    for node, found in sizes:
        out = node.outputs[0]
        node.outputs.clear()
        out.to_constant(found)


def _like(node: gs.Node) -> int | None:
    """The type that CastLike gives a constant, if that of the tensor that it looks at is known."""
    if node.op != "CastLike" or not isinstance(node.inputs[0], gs.Constant) or _stays(node):
        return None
    dtype = node.inputs[1].dtype
    return None if dtype is None or isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _inline_types(edit: Editor) -> None:
    """CastLike of a constant becomes Cast to a type that is known."""
    for node in edit.surgeon.nodes:
        if (dtype := _like(node)) is not None:
            node.op, node.attrs, node.inputs = "Cast", {"to": dtype}, [node.inputs[0]]


def _reads_weight(node: gs.Node) -> bool:
    return any(isinstance(t, gs.Constant) and _is_weight(t) for t in node.inputs)


def _is_weight(constant: gs.Constant) -> bool:
    """A matrix of floats, or anything large: it keeps pointing into the checkpoint, and keeps its name."""
    values = constant._values
    return values.nbytes >= _LARGE or (len(values.shape) >= 2 and values.dtype.kind not in "iub")
