"""Everything that is known before any token arrives is computed now. Weights stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor
from llmlab.graph.rewrite import Match, Pass

_LARGE = 1 << 17  # bytes


class FoldConstants(Pass):
    """Compute what depends on constants alone; weight matrices are left to the target."""

    name = "fold_constants"

    def find(self, edit: Editor) -> Iterator[Match]:
        foldable = [n for n in edit.surgeon.nodes if n.op == "Constant" or (n.inputs and _all_constant(n))]
        if foldable:
            yield Match(node=foldable[0])

    def rewrite(self, edit: Editor, match: Match) -> None:
        _inline_constants(edit)
        edit.surgeon.toposort().fold_constants(
            fold_shapes=False, size_threshold=_LARGE, should_exclude_node=_reads_weight, error_ok=False
        )


def _all_constant(node: gs.Node) -> bool:
    return all(isinstance(t, gs.Constant) for t in node.inputs) and not _reads_weight(node)


def _reads_weight(node: gs.Node) -> bool:
    return any(isinstance(t, gs.Constant) and _is_weight(t) for t in node.inputs)


def _is_weight(constant: gs.Constant) -> bool:
    """A matrix of floats, or anything large: it keeps pointing into the checkpoint, and keeps its name."""
    values = constant._values
    return values.nbytes >= _LARGE or (len(values.shape) >= 2 and values.dtype.kind not in "iub")


def _inline_constants(edit: Editor) -> None:
    """Constant nodes in all their spellings become constants."""
    for node in edit.surgeon.nodes:
        if node.op != "Constant" or len(node.attrs) != 1:
            continue
        key, given = next(iter(node.attrs.items()))
        if isinstance(given, gs.Constant):
            array = np.asarray(given.values)
        elif key in ("value_int", "value_ints"):
            array = np.asarray(given, np.int64)
        elif key in ("value_float", "value_floats"):
            array = np.asarray(given, np.float32)
        else:
            continue
        out = node.outputs[0]
        node.outputs.clear()
        out.to_constant(array)
