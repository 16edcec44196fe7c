"""What is computed twice from the same inputs is computed once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, value
from llmlab.graph.rewrite import Match, Pass


class ShareCommon(Pass):
    """Nodes with the same operator, attributes and inputs become one (common subexpression elimination)."""

    name = "share_common"

    def find(self, edit: Editor) -> Iterator[Match]:
        first: dict[Hashable, gs.Node] = {}
        for node in list(edit.surgeon.nodes):  # in topological order: inputs are shared before their readers are met
            if node.op.startswith("Random") or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
                continue
            key = (
                node.op,
                node.domain,
                len(node.outputs),
                *map(_attribute, sorted(node.attrs.items())),
                *map(_tensor, node.inputs),
            )
            if key in first:
                yield Match(node=node, first=first[key])
            else:
                first[key] = node

    def check(self, edit: Editor, match: Match) -> str | None:
        return "it is an output of the graph" if any(edit.is_output(t) for t in match.node.outputs) else None

    def rewrite(self, edit: Editor, match: Match) -> None:
        for old, new in zip(match.node.outputs, match.first.outputs, strict=True):
            edit.replace(old, new)


def _attribute(item: tuple[str, object]) -> Hashable:
    key, given = item
    if isinstance(given, gs.Constant):
        return key, _tensor(given)
    return key, tuple(given) if isinstance(given, list) else str(given)


def _tensor(tensor: gs.Tensor) -> Hashable:
    """A small constant is its contents, anything else itself."""
    array = value(tensor, limit=1024)
    if array is None:
        return id(tensor) if tensor.name else ""
    return array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()
