"""A graph as a tree: layers, their blocks, the nodes of these; groups of the same structure stand together as one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from llmlab.graph.reports.fold import block_of, layer_of, natural, ranges
from llmlab.graph.reports.snapshot import attribute_text, kind_of, node_names

FEW = 40
"""Nodes of a block that are listed as they are; of more, those of one module become a group."""
MANY = 120
"""Nodes that a group holds at most beside each other; more are cut into pieces."""
NO_MODULE = "no module"
_NUMBER = re.compile(r"\.(\d{1,6})$")


@dataclass(eq=False)
class Leaf:
    """A node of the graph. label: its name without the module that its group stands for."""

    name: str
    node: gs.Node
    index: int
    prepares: bool
    """Whether it depends on constants alone: casts, transposes and joins of weights, which are done once."""
    label: str = ""
    parent: Group | None = None


@dataclass(eq=False)
class Group:
    """A layer, a block or a module, with its leaves in the order of the graph and its rows: leaves, and folds of groups."""

    path: str
    label: str
    leaves: list[Leaf]
    rows: list[Leaf | Fold] = field(default_factory=list)
    parent: Group | None = None
    fold: Fold | None = None


@dataclass(eq=False)
class Fold:
    """Groups of one structure: the same operators, attributes, shapes and types, connected alike. Mostly of one group."""

    members: list[Group]

    @property
    def key(self) -> str:
        """The path of the first."""
        return self.members[0].path

    @property
    def label(self) -> str:
        """`model.layers.0–29`; the label of the group where it is one."""
        first = self.members[0]
        numbers = [int(m[1]) for g in self.members if (m := _NUMBER.search(g.path))]
        if len(self.members) == 1 or len(numbers) != len(self.members):
            return first.label
        return _NUMBER.sub("", first.label) + "." + ranges(sorted(numbers))

    @property
    def leaves(self) -> Iterator[Leaf]:
        return (leaf for group in self.members for leaf in group.leaves)


class Hierarchy:
    """The tree of one graph, its groups by path and its leaves by name.

    root: the group of the whole model. Names of nodes are made unique (llmlab/graph/reports/snapshot.py).
    """

    def __init__(self, graph: gs.Graph, title: str) -> None:
        names = node_names(graph)
        self.leaves: dict[str, Leaf] = {}
        self.by_id: dict[int, Leaf] = {}
        prepared: set[int] = set()
        for index, node in enumerate(graph.nodes):
            prepares = bool(node.inputs) and all(_known(t, prepared) for t in node.inputs)
            prepares = prepares or (not node.inputs and node.op == "Constant")
            if prepares:
                prepared.update(map(id, node.outputs))
            leaf = Leaf(names[id(node)], node, index, prepares)
            self.leaves[leaf.name] = self.by_id[id(node)] = leaf
        self.groups: dict[str, Group] = {}
        self.outputs = {id(t) for t in graph.outputs}
        self.root = Group("", title, list(self.leaves.values()))
        self._hashes = {id(leaf.node): _facts(leaf.node) for leaf in self.root.leaves}
        self._places: dict[tuple[str, str], str] = {}
        self._split(self.root)

    def _split(self, group: Group) -> None:
        """Give `group` its rows, and the groups below theirs."""
        self.groups[group.path] = group
        depth = 0 if group.parent is None else 1 if group.parent.parent is None else 2
        parts: dict[str, list[Leaf]] = {}
        single: list[Leaf] = []
        for leaf in group.leaves:
            place = self._place(leaf, group, depth)
            if place == group.path:
                single.append(leaf)
            else:
                parts.setdefault(place, []).append(leaf)
        if depth > 1 and len(group.leaves) <= FEW:
            parts, single = {}, list(group.leaves)
        if depth > 0:  # a module of one node is that node
            single += [leaf for part in parts.values() if len(part) == 1 for leaf in part]
            parts = {place: part for place, part in parts.items() if len(part) > 1}
        if len(parts) == 1 and not single and depth > 1:
            single, parts = next(iter(parts.values())), {}
        single.sort(key=lambda leaf: leaf.index)
        if len(single) + (0 if depth else len(parts)) > MANY:
            if not depth and len(parts) > MANY:  # as many modules as nodes: names that say nothing
                single, parts = list(group.leaves), {}
            for begin in range(0, len(single), MANY):
                piece = single[begin : begin + MANY]
                parts[f"{group.path}#{begin}"] = piece
            single = []
        below = [self._group(place, part, group) for place, part in parts.items()]
        below.sort(key=_position)
        for leaf in single:
            leaf.parent, leaf.label = group, _within(leaf.name, group.path.partition("#")[0])
        rows: list[Leaf | Fold] = [*single, *self._folds(below)]
        group.rows = sorted(rows, key=lambda row: _position(row.members[0]) if isinstance(row, Fold) else row.index)
        for part in below:
            self._split(part)

    def _place(self, leaf: Leaf, group: Group, depth: int) -> str:
        """The path of the group below `group` that a leaf belongs to; that of `group` itself for one of its own."""
        if "#" in group.path:
            return group.path
        module = leaf.name.rpartition("/")[0]
        if not module:
            return NO_MODULE if depth == 0 else group.path
        known = self._places.get((group.path, module))
        if known is None:
            known = self._places[group.path, module] = self._find_place(leaf, module, group, depth)
        return known

    def _find_place(self, leaf: Leaf, module: str, group: Group, depth: int) -> str:
        if depth == 0:
            return layer_of(leaf.name)
        if depth == 1:
            return block_of(leaf.name)
        inside = module[len(group.path) + 1 :]
        step = re.match(r"[^.]+(\.\d{1,6}(?![^.]))?", inside)
        return f"{group.path}.{step[0]}" if step else group.path

    def _group(self, path: str, leaves: list[Leaf], parent: Group) -> Group:
        label = _within(path, parent.path)
        if "#" in path:
            label = f"nodes {leaves[0].index + 1}–{leaves[-1].index + 1}"
        return Group(path, label, leaves, parent=parent)

    def _folds(self, groups: Sequence[Group]) -> list[Fold]:
        """Groups of one series (`model.layers.0`, `.1`, …) and one structure together."""
        folds: dict[object, Fold] = {}
        for group in groups:
            numbered = _NUMBER.search(group.path)
            key = (group.path[: numbered.start()], self._structure(group)) if numbered else group.path
            fold = folds.setdefault(key, Fold([]))
            fold.members.append(group)
            group.fold = fold
        for fold in folds.values():
            fold.members.sort(key=lambda g: natural(g.path))
        return list(folds.values())

    def _structure(self, group: Group) -> tuple[object, ...]:
        """Equal for two groups whose nodes are the same but for names and the numbers in weights."""
        known: dict[int, int] = {}
        outside: set[int] = set()
        hashes = []
        inside = {id(leaf.node) for leaf in group.leaves}
        for leaf in group.leaves:
            node, facts = leaf.node, self._hashes[id(leaf.node)]
            inputs: list[object] = []
            for tensor in node.inputs:
                if id(tensor) in known:
                    inputs.append(known[id(tensor)])
                else:
                    inputs.append(_kinds(tensor))
                    if not isinstance(tensor, gs.Constant):
                        outside.add(id(tensor))
            leaves = tuple(
                id(t) in self.outputs or any(id(reader) not in inside for reader in t.outputs) for t in node.outputs
            )
            total = hash((facts, tuple(inputs), leaves))
            hashes.append(total)
            for slot, tensor in enumerate(node.outputs):
                known[id(tensor)] = hash((total, slot))
        return (len(outside), tuple(sorted(hashes)))


def _known(tensor: gs.Tensor, prepared: set[int]) -> bool:
    return isinstance(tensor, gs.Constant) or id(tensor) in prepared or tensor.is_empty()


def _facts(node: gs.Node) -> tuple[object, ...]:
    attributes = tuple((key, attribute_text(value)) for key, value in sorted(node.attrs.items()))
    return (node.domain, node.op, attributes, tuple(map(kind_of, node.outputs)))


def _kinds(tensor: gs.Tensor) -> str:
    """Type and shape; of a small constant its value, since that is structure."""
    if isinstance(tensor, gs.Constant) and tensor._values.nbytes <= 64 and hasattr(tensor._values, "tolist"):
        return f"{kind_of(tensor)} {tensor._values.tolist()}"
    return kind_of(tensor) if not tensor.is_empty() else ""


def _position(group: Group) -> int:
    """Where a group begins: at its first node that isn't done beforehand."""
    return next((leaf.index for leaf in group.leaves if not leaf.prepares), group.leaves[-1].index)


def _within(name: str, path: str) -> str:
    """`down_proj/MatMul` of `model.layers.0.mlp.down_proj/MatMul` in `model.layers.0.mlp`."""
    inside = name.removeprefix(path)
    return inside.lstrip("./") or name if path and inside != name and inside[:1] in ("/", ".") else name
