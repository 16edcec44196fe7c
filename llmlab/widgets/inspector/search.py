"""Find nodes, operators, tensors and weights of a graph by a part of their name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from llmlab.graph.reports.fold import fold
from llmlab.widgets.inspector.hierarchy import Leaf

SHOWN = 40
_LOOKED_AT = 1000
KINDS = ("operator", "node", "weight", "tensor")


@dataclass(frozen=True)
class Hit:
    """kind: one of KINDS. text: the name, alike layers as one. node: the first node to look at; count: how many there are."""

    kind: str
    text: str
    node: str
    count: int = 1


class Index:
    """Names in lower case, with the node that they lead to. A tensor leads to its producer, a weight to its first reader."""

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self._entries: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in KINDS}
        operators: dict[str, list[str]] = {}
        seen: set[int] = set()
        for leaf in leaves:
            operators.setdefault(leaf.node.op, []).append(leaf.name)
            self._add("node", leaf.name, leaf.name)
            for tensor in (*leaf.node.inputs, *leaf.node.outputs):
                if id(tensor) not in seen and not tensor.is_empty():
                    seen.add(id(tensor))
                    self._add("weight" if isinstance(tensor, gs.Constant) else "tensor", tensor.name, leaf.name)
        self._operators = operators

    def _add(self, kind: str, name: str, node: str) -> None:
        self._entries[kind].append((name.lower(), name, node))

    def find(self, text: str) -> tuple[list[Hit], int]:
        """The hits to show and how many there are: a name that has all words of `text` in it, whatever their case."""
        words = text.lower().split()
        if not words:
            return [], 0
        hits = [
            Hit("operator", op, nodes[0], len(nodes))
            for op, nodes in sorted(self._operators.items())
            if all(word in op.lower() for word in words)
        ]
        total = len(hits)
        for kind in KINDS[1:]:
            entries = self._entries[kind]
            for word in words:
                entries = [entry for entry in entries if word in entry[0]]
            total += len(entries)
            if len(hits) < SHOWN:
                found = sorted(entries[:_LOOKED_AT], key=lambda entry: not entry[0].endswith(words[-1]))
                hits += [Hit(kind, f.texts[0], found[f.first][2], f.count) for f in fold((e[1],) for e in found)]
        return hits[:SHOWN], total
