"""Small pieces of a graph around the places where a pass rewrote it, before and after: enough to draw them later."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmlab.graph.reports.diff import number, text
from llmlab.graph.reports.fold import fold
from llmlab.graph.reports.snapshot import NodeFacts, Snapshot

MOST_PLACES = 6
"""Places of a pass that are sketched; those that are alike but for their layer count as one."""
MOST_NODES = 32
"""Nodes on each side of a sketch, neighbours included."""


@dataclass(frozen=True)
class SketchNode:
    """A node as `NodeFacts` has it: inputs are names of nodes (with `:1` for another output than the first), of weights or ports."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def to_list(self) -> list[Any]:
        return [self.name, self.op, list(self.inputs), list(self.outputs)]


@dataclass(frozen=True)
class Sketch:
    """The surroundings of one rewrite: what went and its neighbours; what came and its neighbours. left_out: nodes that found no room."""

    node: str
    """The anchor of the rewrite."""
    before: tuple[SketchNode, ...]
    after: tuple[SketchNode, ...]
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        sides = {"before": [n.to_list() for n in self.before], "after": [n.to_list() for n in self.after]}
        return {"node": self.node, **sides, "left_out": self.left_out}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sketch:
        """What `to_dict` gave. Raises TypeError, KeyError or ValueError where it is something else."""

        def side(rows: Sequence[Any]) -> tuple[SketchNode, ...]:
            return tuple(
                SketchNode(text(name), text(op), tuple(map(text, inputs)), tuple(map(text, outputs)))
                for name, op, inputs, outputs in rows
            )

        return cls(text(data["node"]), side(data["before"]), side(data["after"]), number(data["left_out"]))


class Place(Protocol):
    """A `Rewrite`."""

    @property
    def node(self) -> str: ...
    @property
    def added(self) -> tuple[str, ...]: ...
    @property
    def removed(self) -> tuple[str, ...]: ...


_READERS = 3  # of one output that are drawn, where they are nothing but neighbours


def sketches(places: Sequence[Place], before: Snapshot, after: Snapshot) -> tuple[Sketch, ...]:
    """Sketches of the first places that differ by more than the number of their layer."""
    rows = fold((p.node, ", ".join(p.removed), ", ".join(p.added)) for p in places)
    chosen = [places[row.first] for row in rows[:MOST_PLACES]]
    old, new = _Surroundings(before.nodes), _Surroundings(after.nodes)
    return tuple(_sketch(place, old, new) for place in chosen)


def maker(label: str, nodes: Collection[str]) -> str:
    """The node that makes the input `label` of another; empty for a weight or a port."""
    if label in nodes:
        return label
    base = label.rpartition(":")[0]
    return base if base in nodes else ""


class _Surroundings:
    """The neighbours of each node."""

    def __init__(self, nodes: Mapping[str, NodeFacts]) -> None:
        self.nodes = nodes
        self._readers: dict[str, list[str]] = {}
        for name, facts in nodes.items():
            for made in facts.inputs:
                if source := maker(made, nodes):
                    self._readers.setdefault(source, []).append(name)

    def around(self, names: Iterable[str]) -> list[str]:
        """What the given nodes read from and hand to."""
        found: dict[str, None] = {}
        for name in names:
            if name in self.nodes:
                found.update((source, None) for made in self.nodes[name].inputs if (source := maker(made, self.nodes)))
                found.update(dict.fromkeys(self._readers.get(name, ())[:_READERS]))
        return list(found)

    def facts(self, names: Iterable[str]) -> tuple[SketchNode, ...]:
        return tuple(SketchNode(n, f.op, f.inputs, f.outputs) for n in names if (f := self.nodes.get(n)) is not None)


def _sketch(place: Place, old: _Surroundings, new: _Surroundings) -> Sketch:
    went = [name for name in dict.fromkeys((*place.removed, place.node)) if name in old.nodes]
    came = [name for name in dict.fromkeys((*place.added, place.node)) if name in new.nodes]
    beside = dict.fromkeys((*old.around(went), *new.around(came)))
    sides = [[*core, *(name for name in beside if name not in core)] for core in (went, came)]
    kept = [[n for n in names if n in side.nodes] for names, side in zip(sides, (old, new), strict=True)]
    left_out = sum(max(len(names) - MOST_NODES, 0) for names in kept)
    return Sketch(place.node, old.facts(kept[0][:MOST_NODES]), new.facts(kept[1][:MOST_NODES]), left_out)
