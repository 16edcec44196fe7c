"""Keys and values are not repeated for every query head: Attention groups heads itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Dim, Editor, producer, scope
from llmlab.graph.rewrite import Match, Pass


class RemoveGQAExpansion(Pass):
    """Expand → Reshape in front of Attention's keys or values goes, also from under their RoPE (grouped-query attention)."""

    name = "remove_gqa_expansion"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "Attention":
            return None
        expanded = {i: found for i in (1, 2) if (found := _find(node.inputs[i])) is not None}
        return Match(node=node, expanded=expanded) if expanded else None

    def check(self, edit: Editor, match: Match) -> str | None:
        for found in match.expanded.values():
            if (reason := found.check()) is not None:
                return reason
        if len(match.expanded) != 2 or len({found.heads for found in match.expanded.values()}) != 1:
            return "keys and values are not expanded alike"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        for i, found in match.expanded.items():
            match.node.inputs[i] = found.narrow(edit)


@dataclass
class _Expansion:
    """Reshape(Expand(x)), or Expand(x) of one head, and what is done to each head alike behind it, in order."""

    reshape: gs.Node | None
    expand: gs.Node
    behind: list[gs.Node]
    heads: int = 0

    @property
    def axis(self) -> int:
        """Where the heads are in the Reshape's result: a Transpose behind it moves them."""
        return 1 + sum(n.op == "Transpose" for n in self.behind) % 2

    def check(self) -> str | None:
        narrow, wide = self.expand.inputs[0].shape, self.expand.outputs[0].shape
        if self.reshape is None:
            self.heads = 1
            return None if _repeats_one_head(narrow, wide, self.axis) else f"{narrow} is expanded to {wide}"
        out = self.reshape.outputs[0].shape
        if narrow is None or wide is None or out is None or len(narrow) != 5 or len(wide) != 5 or len(out) != 4:
            return "the shapes around the expansion are not known"
        at, heads = self.axis, narrow[self.axis]
        if narrow[at + 1] != 1:
            return "the new axis is not the one behind the KV heads"
        others = [i for i in range(5) if i != at + 1]
        if not isinstance(heads, int) or not isinstance(wide[at + 1], int) or any(narrow[i] != wide[i] for i in others):
            return f"{narrow} is expanded to {wide}, not along the group axis alone"
        if list(out) != [*wide[:at], heads * wide[at + 1], *wide[at + 2 :]]:
            return f"{wide} is reshaped to {out}, which mixes heads"
        self.heads = heads
        return None

    def narrow(self, edit: Editor) -> gs.Tensor:
        """The tensor as it is before heads are repeated."""
        x, at, where = self.expand.inputs[0], self.axis + 1, scope(self.expand)
        unsqueeze = producer(x, "Unsqueeze")
        shape = [d for i, d in enumerate(x.shape or ()) if i != at or self.reshape is None]
        if self.reshape is None:
            tensor = x
        elif unsqueeze is not None and list(unsqueeze.inputs[0].shape or ()) == shape:
            tensor = unsqueeze.inputs[0]
        else:
            axis = edit.constant(f"{where}/group", np.array([at], np.int64))
            tensor = edit.add("Squeeze", where, [x, axis], dtype=x.dtype, shape=shape)
        for node in self.behind:
            shape = [shape[i] for i in node.attrs["perm"]] if node.op == "Transpose" else shape
            inputs = [tensor, *node.inputs[1:]]
            tensor = edit.add(node.op, scope(node), inputs, node.attrs, dtype=node.outputs[0].dtype, shape=shape)
        return tensor


def _find(tensor: gs.Tensor) -> _Expansion | None:
    behind: list[gs.Node] = []
    while (node := producer(tensor)) is not None:
        swap = node.op == "Transpose" and list(node.attrs.get("perm", ())) == [0, 2, 1, 3]
        if not swap and not (node.op == "RotaryEmbedding" and len(tensor.shape or ()) == 4):
            break
        behind.insert(0, node)
        tensor = node.inputs[0]
    if node is None or node.op not in ("Expand", "Reshape"):
        return None
    if node.op == "Expand":
        return _Expansion(None, node, behind)
    expand = producer(node.inputs[0], "Expand")
    return None if expand is None else _Expansion(node, expand, behind)


def _repeats_one_head(narrow: list[Dim] | None, wide: list[Dim] | None, axis: int) -> bool:
    if narrow is None or wide is None or len(narrow) != 4 or len(wide) != 4 or not isinstance(wide[axis], int):
        return False
    return narrow[axis] == 1 and all(n == w for i, (n, w) in enumerate(zip(narrow, wide, strict=True)) if i != axis)
