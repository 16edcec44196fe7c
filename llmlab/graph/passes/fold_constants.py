"""Everything that is known before any token arrives is computed now. Weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.bounded import CannotEvaluate
from llmlab.graph.analysis.evaluate import excerpt
from llmlab.graph.edit import Editor, ancestors, inline_constants, is_bfloat16, sort_nodes
from llmlab.graph.rewrite import Match, Pass

_LARGE = 1 << 17  # bytes


class FoldConstants(Pass):
    """Compute what depends on constants alone; weight matrices are left to the target."""

    name = "fold_constants"

    def find(self, edit: Editor) -> Iterator[Match]:
        foldable = [
            n for n in edit.surgeon.nodes if n.op == "Constant" or (n.inputs and _all_constant(n)) or _known_size(n)
        ]
        if foldable:
            yield Match(node=foldable[0])

    def rewrite(self, edit: Editor, match: Match) -> None:
        inline_constants(edit.surgeon)
        _inline_sizes(edit)
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


def _known_size(node: gs.Node) -> list[int] | None:
    """What a Shape node gives, if the axes that it asks for have known sizes."""
    if node.op != "Shape" or node.inputs[0].shape is None:
        return None
    sizes = list(node.inputs[0].shape)[node.attrs.get("start", 0) : node.attrs.get("end")]
    return sizes if sizes and all(isinstance(n, int) for n in sizes) else None


def _inline_sizes(edit: Editor) -> None:
    """Shape nodes of known sizes become constants."""
    for node in edit.surgeon.nodes:
        if (sizes := _known_size(node)) is not None:
            out = node.outputs[0]
            node.outputs.clear()
            out.to_constant(np.asarray(sizes, np.int64))


def _reads_weight(node: gs.Node) -> bool:
    return any(isinstance(t, gs.Constant) and _is_weight(t) for t in node.inputs)


def _is_weight(constant: gs.Constant) -> bool:
    """A matrix of floats, or anything large: it keeps pointing into the checkpoint, and keeps its name."""
    values = constant._values
    return values.nbytes >= _LARGE or (len(values.shape) >= 2 and values.dtype.kind not in "iub")
