"""Everything that is known before any token arrives is computed now. Weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, inline_constants, is_bfloat16
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
        edit.surgeon.toposort().fold_constants(
            fold_shapes=False,
            size_threshold=_LARGE,
            should_exclude_node=_stays,
            error_ok=False,
            recurse_functions=False,
        )


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
