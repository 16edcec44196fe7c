"""What is different between two graphs: nodes added, removed and changed, and how; weights that came, went or changed type."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import onnx_graphsurgeon as gs
from rich.console import Group, RenderableType
from rich.text import Text

from llmlab.errors import InputError
from llmlab.graph.reports.fold import Folded, block_of, fold, layer_of, natural
from llmlab.graph.reports.render import details, lines_html, lines_text, plain, tally
from llmlab.graph.reports.snapshot import NodeFacts, Snapshot, snapshot

NOTHING = "–"
NO_DIFFERENCE = "no difference"


class Change(NamedTuple):
    """One difference at a node: `what` is `operator`, `input 0`, `output 0` or `attribute axis`; `–` is absent."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class GraphDiff:
    """Two graphs, compared node by node under their names. Whether weights of one name hold the same numbers isn't looked at.

    Iterating `added`, `removed` or `changed` gives names of nodes.
    """

    added: Mapping[str, str] = field(default_factory=dict)
    """Operator of each node that only the second graph has."""
    removed: Mapping[str, str] = field(default_factory=dict)
    """Operator of each node that only the first graph has."""
    changed: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    """What is different at each node that both have."""
    ops: Mapping[str, int] = field(default_factory=dict)
    """Change in the number of nodes by operator; zeros left out."""
    weights: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Type and shape of a weight before and after, such as `float32[64, 8]`; `–` where it isn't there."""
    ports: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """The same of the graph's inputs and outputs, such as `input input_ids`."""

    def __bool__(self) -> bool:
        """Whether anything is different."""
        return bool(self.added or self.removed or self.changed or self.weights or self.ports)

    def by_layer(self) -> dict[str, dict[str, int]]:
        """`{layer: {"added": n, "removed": n, "changed": n}}` for every layer that something changed in."""
        table: dict[str, Counter[str]] = {}
        for what in KINDS:
            for name in getattr(self, what):
                table.setdefault(layer_of(name), Counter())[what] += 1
        return {layer: {what: table[layer][what] for what in KINDS} for layer in sorted(table, key=natural)}

    def at(self, here: Callable[[str], bool]) -> GraphDiff:
        """The part of it at the nodes that `here` says yes to; without weights and ports, which belong to no one node."""
        added, removed = ({n: op for n, op in nodes.items() if here(n)} for nodes in (self.added, self.removed))
        ops = Counter(added.values())
        ops.subtract(Counter(removed.values()))
        return GraphDiff(
            added,
            removed,
            {n: c for n, c in self.changed.items() if here(n)},
            {o: n for o, n in sorted(ops.items()) if n},
        )

    def blocks(self) -> list[Folded]:
        """Lines by part of a layer, its name first; parts of different layers in which the same happened are one.

        A line starts with `+` (added), `-` (removed) or `~` (changed), or with a blank where it says more of the one
        before. Several nodes of one operator that came or went together share a line.
        """
        lines: dict[str, list[str]] = {}
        for sign, nodes in (("+", self.added), ("-", self.removed)):
            for where, op, names in _alike((name, op) for name, op in nodes.items()):
                what = f"{where}/{op} ({len(names)}×)" if len(names) > 1 else _with_operator(names[0], op)
                lines.setdefault(block_of(names[0]), []).append(f"{sign} {what}")
        whats = {name: ", ".join(c.what for c in changes) for name, changes in self.changed.items()}
        for _, _, names in _alike((name, f"{_operator(name)}, {what}") for name, what in whats.items()):
            more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
            block = lines.setdefault(block_of(names[0]), [])
            block.append(f"~ {names[0]}{more}")
            block += [f"  {c.what}: {c.before} → {c.after}" for c in self.changed[names[0]]]
        return fold((block or "no module", *lines[block]) for block in sorted(lines, key=natural))

    def tensor_lines(self) -> list[Folded]:
        """A line for each port and weight, as those of `blocks`."""
        rows, tensors = [], {**self.ports, **self.weights}
        for name in [*self.ports, *sorted(self.weights, key=natural)]:
            before, after = tensors[name]
            sign = "+" if before == NOTHING else "-" if after == NOTHING else "~"
            size = f"{before} → {after}" if sign == "~" else after if sign == "+" else before
            rows.append((f"{sign} {name}  {size}",))
        return fold(rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "added": dict(self.added),
            "removed": dict(self.removed),
            "changed": {name: [list(change) for change in changes] for name, changes in self.changed.items()},
            "ops": dict(self.ops),
            "weights": {name: list(sizes) for name, sizes in self.weights.items()},
            "ports": {name: list(sizes) for name, sizes in self.ports.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphDiff:
        """What `to_dict` gave; also that of llmlab 0.1, which lists names. Raises TypeError, KeyError or ValueError."""
        added, removed, changed = (
            dict.fromkeys(data[what], () if what == "changed" else "") if isinstance(data[what], list) else data[what]
            for what in KINDS
        )
        return cls(
            {text(name): text(op) for name, op in added.items()},
            {text(name): text(op) for name, op in removed.items()},
            {text(name): tuple(Change(*map(text, c)) for c in changes) for name, changes in changed.items()},
            {text(op): number(count) for op, count in data["ops"].items()},
            *(
                {text(name): (text(before), text(after)) for name, (before, after) in data.get(what, {}).items()}
                for what in ("weights", "ports")
            ),
        )

    def __str__(self) -> str:
        """Counts of nodes, and of other things where there are any: `2 added, 1 removed nodes; 3 weights`."""
        nodes = ", ".join(f"{len(getattr(self, what))} {what}" for what in KINDS if getattr(self, what))
        counts = [f"{nodes} nodes"] if nodes else []
        counts += [f"{len(self.weights)} weights"] if self.weights else []
        counts += [f"{len(self.ports)} inputs and outputs"] if self.ports else []
        return "; ".join(counts) or NO_DIFFERENCE

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        return _text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": _html(self)}


KINDS = ("added", "removed", "changed")


def _text(found: GraphDiff) -> RenderableType:
    if not found:
        return Text(NO_DIFFERENCE)
    parts: list[Text] = [Text(f"{found}  (+ added, - removed, ~ changed)", "bold")]
    for block in found.blocks():
        parts.append(plain(block.texts[0] + block.times, "bold"))
        parts += lines_text(block.texts[1:], "  ")
    if tensors := found.tensor_lines():
        parts.append(Text("inputs, outputs and weights", "bold"))
        parts += lines_text([line.texts[0] + line.times for line in tensors], "  ")
    return Group(*parts)


def _html(found: GraphDiff) -> str:
    if not found:
        return f"<div>{NO_DIFFERENCE}</div>"
    operators = ", ".join(f"{op} {change:+d}" for op, change in found.ops.items())
    return (
        f"<div><b>{html.escape(str(found))}</b><br><small>{html.escape(operators)}</small></div>"
        + "".join(details(b.texts[0] + b.times + tally(b.texts[1:]), lines_html(b.texts[1:])) for b in found.blocks())
        + details(
            "inputs, outputs and weights", lines_html([line.texts[0] + line.times for line in found.tensor_lines()])
        )
    )


def _operator(name: str) -> str:
    """`MatMul` of `model.layers.0.mlp/MatMul_2`: nodes carry the name of their operator as a rule."""
    return re.sub(r"_\d+$", "", name.rpartition("/")[2])


def _with_operator(name: str, op: str) -> str:
    return name if op in ("", _operator(name)) else f"{name} ({op})"


def _alike(nodes: Iterable[tuple[str, str]]) -> list[tuple[str, str, list[str]]]:
    """(module, what, names): nodes of one module that have the same said of them, in the order of the first of each."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, what in nodes:
        groups.setdefault((name.rpartition("/")[0] if "/" in name else name, what), []).append(name)
    return [(where, what, names) for (where, what), names in groups.items()]


def text(value: Any) -> str:
    """`value`, read from a file, if it is text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def number(value: Any) -> int:
    """`value`, read from a file, if it is an integer. Raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


class HasNodes(Protocol):
    """A `Graph`, or anything else with the surgeon's graph in it."""

    surgeon: gs.Graph


def diff(a: HasNodes, b: HasNodes) -> GraphDiff:
    """What is different in graph `b`, seen from graph `a`: any two of them, plain, serving or lowered.

    Nodes are the same if they have the same name. Raises InputError where one isn't a Graph.
    """
    for given in (a, b):
        if not isinstance(getattr(given, "surgeon", None), gs.Graph):
            raise InputError(f"expected two Graphs to compare, got {type(given).__name__}")
    return compare(snapshot(a.surgeon), snapshot(b.surgeon))


def compare(before: Snapshot, after: Snapshot) -> GraphDiff:
    """What is different in the second snapshot."""
    ops = Counter(facts.op for facts in after.nodes.values())
    ops.subtract(Counter(facts.op for facts in before.nodes.values()))
    return GraphDiff(
        added={n: facts.op for n, facts in after.nodes.items() if n not in before.nodes},
        removed={n: facts.op for n, facts in before.nodes.items() if n not in after.nodes},
        changed={
            n: tuple(_changes(before.nodes[n], facts))
            for n, facts in after.nodes.items()
            if n in before.nodes and before.nodes[n] != facts
        },
        ops={op: count for op, count in sorted(ops.items()) if count},
        weights=_different(before.weights, after.weights),
        ports=_different(before.ports, after.ports),
    )


def _different(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    pairs = {name: (before.get(name, NOTHING), after.get(name, NOTHING)) for name in {**before, **after}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _changes(before: NodeFacts, after: NodeFacts) -> list[Change]:
    old, new = _parts(before), _parts(after)
    return [Change(what, *pair) for what, pair in _different(old, new).items()]


def _parts(facts: NodeFacts) -> dict[str, str]:
    parts = {"operator": facts.op}
    parts |= {f"input {i}": name for i, name in enumerate(facts.inputs) if name}
    parts |= {f"output {i}": kind for i, kind in enumerate(facts.outputs)}
    return parts | {f"attribute {key}": value for key, value in facts.attributes}
