"""x[..., [i], :] as torch's exporter writes it is three nodes; ONNX has one."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, producer, scope, value
from llmlab.graph.rewrite import Match, Pass


class PlainGather(Pass):
    """Transpose → GatherND by constants along one axis → Transpose back: one Gather along that axis."""

    name = "plain_gather"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "GatherND" or (indices := value(node.inputs[1])) is None:
            return None
        before, readers = producer(node.inputs[0], "Transpose"), node.outputs[0].outputs
        if before is None or len(readers) != 1 or readers[0].op != "Transpose":
            return None
        return Match(node=node, before=before, after=readers[0], indices=indices)

    def check(self, edit: Editor, match: Match) -> str | None:
        if match.node.attrs.get("batch_dims", 0) or match.indices.ndim != 2 or match.indices.shape[1] != 1:
            return f"it gathers by indices of shape {list(match.indices.shape)}, not a list along one axis"
        there, back = (list(n.attrs.get("perm", ())) for n in (match.before, match.after))
        if not there or [there[i] for i in back] != list(range(len(there))):
            return "the transposes around it don't undo each other"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        axis, old = match.before.attrs["perm"][0], match.after.outputs[0]
        index = edit.constant(f"{match.node.name}/index", np.ascontiguousarray(match.indices[:, 0]))
        x, where = match.before.inputs[0], scope(match.node)
        edit.replace(old, edit.add("Gather", where, [x, index], {"axis": axis}, dtype=old.dtype, shape=old.shape))
