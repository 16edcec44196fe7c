"""What the inspector shows, and what was chosen there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmlab.errors import InputError, nearest
from llmlab.graph.graph import Graph
from llmlab.widgets.inspector.edges import Edges, find_edges
from llmlab.widgets.inspector.hierarchy import Fold, Group, Hierarchy, Leaf
from llmlab.widgets.inspector.overlays import Overlay, error_overlay, overlays, time_overlay
from llmlab.widgets.inspector.search import Hit
from llmlab.widgets.inspector.sizes import bytes_text, number_text
from llmlab.widgets.inspector.values import Histogram

MOST_ROWS = 300
"""Rows of the tree at a time; unfolding more folds what lies elsewhere."""


class InspectorState:
    """A graph as a tree, the overlays on it, and what is unfolded, shown, looked at and searched."""

    is_static: bool  # the panel says

    def __init__(
        self, graph: Graph, *, times: Mapping[str, float] | None, engine: Any, reference: Graph | None
    ) -> None:
        self.graph, self.reference, self.engine = graph, reference, engine
        kind = "quantized " if graph.recipe else ""
        self.tree = Hierarchy(graph.surgeon, f"{kind}{graph.kind} {graph.config.model_type}")
        self.leaves = list(self.tree.leaves.values())
        self.context = 1024
        self.overlays = overlays(self.leaves, self.context)
        self.overlays["time"] = time_overlay(dict(times or {}))
        missing = "" if reference is not None else "give the graph before: inspect(graph, reference=wide)"
        self.overlays["error"] = error_overlay({}, missing)
        self.overlay: Overlay = self.overlays["bytes"]
        self.whole = 0.0
        self.unfolded: set[str] = {""}
        self.chosen: dict[str, int] = {}
        self.group: Group = self.tree.root
        self.leaf: Leaf | None = None
        self.looked_at: int | None = None
        self.histograms: list[tuple[str, Histogram]] = []
        self.query = ""
        self.hits: list[Hit] = []
        self.found = 0
        self.working = ""
        self._edges: dict[tuple[str, ...], Edges] = {}
        self.weigh()

    def title(self) -> str:
        nodes = f"{len(self.leaves):,} node{'' if len(self.leaves) == 1 else 's'}"
        sizes = (self.overlays["bytes"], bytes_text), (self.overlays["parameters"], number_text)
        size, count = (text(overlay.at(self.tree.root).value) for overlay, text in sizes)
        return f"{self.tree.root.label} graph: {nodes}, {count} parameters, {size}"

    def member(self, fold: Fold) -> Group:
        """The group that stands for a fold."""
        return fold.members[min(self.chosen.get(fold.key, 0), len(fold.members) - 1)]

    def rows(self) -> list[tuple[int, Group | Fold | Leaf]]:
        """What is unfolded, with its depth, from top to bottom."""
        shown: list[tuple[int, Group | Fold | Leaf]] = [(1, self.tree.root)]

        def walk(group: Group, depth: int) -> None:
            for row in group.rows:
                shown.append((depth, row))
                if isinstance(row, Fold) and self.is_unfolded(row):
                    walk(self.member(row), depth + 1)

        if "" in self.unfolded:
            walk(self.tree.root, 2)
        return shown

    def is_unfolded(self, row: Group | Fold) -> bool:
        return (row.key if isinstance(row, Fold) else row.path) in self.unfolded

    def reveal(self, group: Group) -> None:
        """Unfold what lies around `group`, and let it stand for its fold."""
        around: set[str] = {""}
        self.group, here = group, group
        while here.parent is not None:
            assert here.fold is not None
            around.add(here.fold.key)
            self.chosen[here.fold.key] = here.fold.members.index(here)
            here = here.parent
        self.unfolded |= around
        if len(self.rows()) > MOST_ROWS:
            self.unfolded = around

    def key_of(self, row: Leaf | Fold) -> str:
        """Names a row: the node, or the path of the group that stands for the fold."""
        return row.name if isinstance(row, Leaf) else self.member(row).path

    def edges(self, rows: Sequence[Leaf | Fold]) -> Edges:
        """What goes between these rows, in and out; found once."""
        keys = tuple(map(self.key_of, rows))
        if keys not in self._edges:
            self._edges[keys] = find_edges(rows, keys, self.tree.outputs)
        return self._edges[keys]

    def find_group(self, path: str) -> Group:
        """The layer, block or module of that path. InputError where there is none."""
        if path not in self.tree.groups:
            raise InputError(f"{path!r} is no part of this graph ({nearest(path, self.tree.groups)})")
        return self.tree.groups[path]

    def show(self, name: str) -> None:
        """Show the node called `name`, or the layer, block or module of that path: what a click on it does."""
        if name not in self.tree.leaves:
            self.reveal(self.find_group(name))
            self.pick(None)
            return
        leaf = self.tree.leaves[name]
        assert leaf.parent is not None
        self.reveal(leaf.parent)
        self.pick(leaf)

    def pick(self, leaf: Leaf | None) -> None:
        """What the details are about; None: the group."""
        self.leaf, self.looked_at, self.histograms = leaf, None, []

    def weigh(self) -> None:
        """What a full bar means: the whole model, or for errors the largest."""
        if self.overlay.name == "error":
            self.whole = max((self.overlay.at(leaf).value for leaf in self.leaves), default=0.0)
        else:
            self.whole = self.overlay.at(self.tree.root).value

    def sums(self) -> dict[str, Any]:
        """The sum of each overlay for layers and their blocks, alike ones as one."""

        def part(row: Group | Fold, depth: int) -> dict[str, Any]:
            group = self.member(row) if isinstance(row, Fold) else row
            leaves = list(row.leaves)
            entry: dict[str, Any] = {"path": group.path, "label": row.label, "nodes": len(leaves)}
            entry["alike"] = len(row.members) if isinstance(row, Fold) else 1
            for name, overlay in self.overlays.items():
                if name not in ("precision", "error"):
                    entry[name] = overlay.of(leaves)
            if depth < 2:
                entry["parts"] = [part(r, depth + 1) for r in group.rows if isinstance(r, Fold)]
            return entry

        return part(self.tree.root, 0)

    def __str__(self) -> str:
        lines = [self.title()]
        for row in self.tree.root.rows:
            label = row.label + (f" (×{len(row.members)})" if isinstance(row, Fold) and len(row.members) > 1 else "")
            leaves = [row] if isinstance(row, Leaf) else list(row.leaves)
            nodes = f"{len(leaves):,} node{'' if len(leaves) == 1 else 's'}"
            lines.append(f"  {label}: {nodes}, {self.overlays['bytes'].shown(leaves) or 'no weights'}")
        return "\n".join(lines[:20])
