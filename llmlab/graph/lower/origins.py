"""Which nodes of a graph the nodes of its lowered form compute, found from the tensors that both have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from llmlab.graph.disjoint import DisjointSets
from llmlab.graph.graph import Graph


@dataclass(frozen=True)
class Origin:
    """The smallest set of nodes that can be held against each other: `nodes` of the graph became `made`."""

    nodes: tuple[str, ...]
    """Empty where the lowering, or the compiler, added something of its own."""
    made: tuple[str, ...]
    """Never empty."""


@dataclass(frozen=True)
class Origins:
    """Every node of a graph, once: in one of `groups`, or among those that nothing is left of."""

    ops: Mapping[str, str] = field(default_factory=dict)
    """Operator by name of the nodes that there were, in their order."""
    groups: tuple[Origin, ...] = ()
    folded: tuple[str, ...] = ()
    """Computed when weights were written, or found to be of no use."""

    def to_dict(self) -> dict[str, Any]:
        groups = [{"nodes": list(g.nodes), "made": list(g.made)} for g in self.groups]
        return {"ops": dict(self.ops), "groups": groups, "folded": list(self.folded)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origins:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        groups = tuple(Origin(tuple(map(str, g["nodes"])), tuple(map(str, g["made"]))) for g in data["groups"])
        ops = {str(name): str(op) for name, op in data["ops"].items()}
        return cls(ops, groups, tuple(map(str, data["folded"])))


def origins(graph: Graph, lowered: Graph) -> Origins:
    """`lowered` was made of a copy of `graph`, whose names it keeps (`Graph.stands_for` has the others)."""
    ops = {node.name: node.op for node in graph.surgeon.nodes}
    return Origins(ops, *match(graph.surgeon.nodes, lowered.surgeon.nodes, lowered.stands_for))


def match(
    before: Sequence[gs.Node], after: Sequence[gs.Node], stands_for: Mapping[str, str] | None = None
) -> tuple[tuple[Origin, ...], tuple[str, ...]]:
    """Groups of `after`'s order, and the names of those of `before` that none of `after` computes.

    A tensor that both make, under one name or one that `stands_for` knows, is where groups end; nodes that hand each other
    any other tensor are in one group. What depends on constants alone goes with what reads it, or with nothing if several groups do.
    """
    both = {t.name for n in before for t in n.outputs if t.name}
    sides = [
        _Side(before, {}, both),
        _Side(after, stands_for or {}, both),
    ]
    common = sides[0].made & sides[1].made
    sets = DisjointSets()
    for number, side in enumerate(sides):
        for node in side.moving:
            for tensor in side.touches(node, common):
                sets.join((number, node.name), tensor if tensor in common else (number, tensor))
    places: dict[Any, int] = {}
    found: list[tuple[list[str], list[str]]] = []
    for number in (1, 0):
        for node in sides[number].moving:
            place = places.setdefault(sets.find((number, node.name)), len(places))
            if place == len(found):
                found.append(([], []))
            found[place][number].append(node.name)
    lost: list[str] = []
    for number, side in enumerate(sides):
        homes = {name: i for i, names in enumerate(found) for name in names[number]}
        for name in reversed(side.constant(common)):
            readers = {homes.get(reader) for reader in side.readers[name]}
            home = readers.pop() if len(readers) == 1 else None
            if home is not None:
                homes[name] = home
                found[home][number].append(name)
            elif number:
                homes[name] = len(found)
                found.append(([], [name]))
            else:
                lost.append(name)
    order = {node.name: i for i, node in enumerate(before)}
    made = [Origin(tuple(sorted(old, key=order.__getitem__)), tuple(new)) for old, new in found if new]
    lost += [name for old, new in found if not new for name in old]
    return tuple(made), tuple(sorted(lost, key=order.__getitem__))


class _Side:
    """One of two graphs, its tensors under the names that both know."""

    def __init__(self, nodes: Iterable[gs.Node], stands_for: Mapping[str, str], known: set[str]) -> None:
        self.nodes = list(nodes)
        self._stands_for, self._known = stands_for, known
        self.made = {self._name(t) for n in self.nodes for t in n.outputs if t.name}
        fixed: set[str] = set()
        for node in self.nodes:
            if node.inputs and all(_fixed(t, fixed) for t in node.inputs):
                fixed.add(node.name)
        self._fixed = fixed
        self.moving = [node for node in self.nodes if node.name not in fixed]
        self.readers = {node.name: [r.name for t in node.outputs for r in t.outputs] for node in self.nodes}

    def constant(self, common: set[str]) -> list[str]:
        return [node.name for node in self.nodes if node.name in self._fixed]

    def touches(self, node: gs.Node, common: set[str]) -> list[str]:
        """What a node makes, and what it reads that the other side doesn't make."""
        outputs = [self._name(t) for t in node.outputs if t.name]
        moving = (t for t in node.inputs if t.inputs and t.inputs[0].name not in self._fixed)
        inputs = (self._name(t) for t in moving if t.name)
        return [*outputs, *(name for name in inputs if name not in common)]

    def _name(self, tensor: gs.Tensor) -> str:
        name, seen = tensor.name, set()
        while name not in self._known and name in self._stands_for and name not in seen:
            seen.add(name)
            name = self._stands_for[name]
        return str(name)


def _fixed(tensor: gs.Tensor, nodes: set[str]) -> bool:
    if isinstance(tensor, gs.Constant) or not tensor.name:
        return True
    return bool(tensor.inputs) and tensor.inputs[0].name in nodes
