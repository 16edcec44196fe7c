"""The picture of what is unfolded: its parts and nodes, laid out from top to bottom, and what comes from and goes outside."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs
from markupsafe import Markup

from llmlab.graph.reports.snapshot import kind_of
from llmlab.widgets.inspector.hierarchy import Fold, Group, Leaf
from llmlab.widgets.inspector.overlays import PrecisionOverlay
from llmlab.widgets.inspector.sizes import kind_and_bytes
from llmlab.widgets.inspector.state import InspectorState
from llmlab.widgets.markup import button, h, select
from llmlab.widgets.picture import MOST, Arrow, Box, picture

_NOTES = 3


def block(panel: InspectorState, group: Group) -> Markup:
    rows = [row for row in group.rows if not (isinstance(row, Leaf) and row.node.op == "Constant")]
    shown = rows[:MOST]
    boxes, arrows = parts(panel, shown)
    left = f"The first {len(shown)} of {len(rows)}; search finds the others." if len(rows) > len(shown) else ""
    hidden = sum(isinstance(row, Leaf) and row.node.op == "Constant" for row in group.rows)
    left += f" {hidden} Constant nodes aren't drawn." if hidden else ""
    return h(
        "div",
        h("div", _path(panel, group), _chooser(panel, group), class_="bar"),
        picture(boxes, arrows, f"graph of {group.path or group.label}"),
        h("small", left) if left else None,
    )


def _path(panel: InspectorState, group: Group) -> Markup:
    """The way to the group, each part a button."""
    way: list[Group] = []
    here: Group | None = group
    while here is not None:
        way.append(here)
        here = here.parent
    steps: list[Markup] = []
    for part in reversed(way):
        if steps:
            steps.append(h("span", " › ", class_="soft"))
        steps.append(h("b", part.label) if part is group or panel.is_static else button(part.label, "enter", part.path))
    return h("span", steps)


def _chooser(panel: InspectorState, group: Group) -> Markup | None:
    """Which of several alike groups is shown: their weights differ."""
    here: Group | None = group
    while here is not None and (here.fold is None or len(here.fold.members) == 1):
        here = here.parent
    if here is None or here.fold is None or panel.is_static:
        return (
            h("small", f"one of {len(here.fold.members)} alike") if here is not None and here.fold is not None else None
        )
    inside = group.path[len(here.path) :]
    options = [(m.path + inside, m.path) for m in here.fold.members if m.path + inside in panel.tree.groups]
    return select(f"one of {len(here.fold.members)} alike:", "member", options, group.path)


def parts(panel: InspectorState, rows: list[Leaf | Fold]) -> tuple[list[Box], list[Arrow]]:
    """Boxes and arrows of the rows of a group, and of what they read from and hand to outside."""
    names, inner, inward, outward = panel.edges(rows)
    boxes = _sources(panel, inward)
    boxes += _boxes(panel, rows, inner, outward)
    arrows = [Arrow(a, b, [_said(t) for t in tensors.values()]) for (a, b), tensors in inner.items()]
    for tensor, readers in inward.values():
        arrows += [Arrow(_outside(readers), reader, [_said(tensor)]) for reader in readers]
    goals = _goals(panel, names, outward)
    arrows += [Arrow(key, f"to {key}", [_said(t) for t, k in outward.values() if k == key]) for key in goals]
    return [*boxes, *(Box(f"to {key}", lines, kind="outside") for key, lines in goals.items())], arrows


def _said(tensor: gs.Tensor) -> str:
    return f"{tensor.name}: {kind_and_bytes(tensor)}"


def _outside(readers: Iterable[str]) -> str:
    return "from " + "\n".join(readers)


def _sources(panel: InspectorState, inward: dict[int, tuple[gs.Tensor, dict[str, None]]]) -> list[Box]:
    """A box for what comes from outside: all that the same boxes read together."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for tensor, readers in inward.values():
        maker = panel.tree.by_id.get(id(tensor.inputs[0])) if tensor.inputs else None
        text = tensor.name if maker is None or maker.parent is None else f"from {maker.name}"
        lines.setdefault(_outside(readers), []).append((text, kind_of(tensor)))
    boxes = []
    for key, found in lines.items():
        names = [name for name, _ in found[:4]] + ([f"and {len(found) - 4} more"] if len(found) > 4 else [])
        notes = [found[0][1]] if len(found) == 1 else []
        boxes.append(Box(key, names, notes, "outside", title="; ".join(f"{n} {k}" for n, k in found[:12])))
    return boxes


def _goals(
    panel: InspectorState, names_of: dict[int, str], outward: dict[int, tuple[gs.Tensor, str]]
) -> dict[str, list[str]]:
    """Lines about who reads outside what each box makes."""
    goals: dict[str, dict[str, None]] = {}
    for tensor, key in outward.values():
        names = goals.setdefault(key, {})
        if id(tensor) in panel.tree.outputs:
            names[f"output {tensor.name}"] = None
        for reader in tensor.outputs:
            if id(reader) not in names_of and (leaf := panel.tree.by_id.get(id(reader))) is not None:
                names[f"to {leaf.name}"] = None
    shown = {key: list(names) for key, names in goals.items() if names}
    return {
        key: [*names[:3], *([f"and {len(names) - 3} more"] if len(names) > 3 else [])] for key, names in shown.items()
    }


def _boxes(
    panel: InspectorState,
    rows: list[Leaf | Fold],
    inner: dict[tuple[str, str], dict[int, gs.Tensor]],
    outward: dict[int, tuple[gs.Tensor, str]],
) -> list[Box]:
    overlay = panel.overlay
    largest = 1.0
    if not isinstance(overlay, PrecisionOverlay):
        largest = max((overlay.at(row).value for row in rows), default=0.0)
        largest = panel.whole if overlay.name == "error" else largest
    boxes = []
    for row in rows:
        key = panel.key_of(row)
        number, value, color = overlay.at(row)
        if isinstance(overlay, PrecisionOverlay):
            heat = 0.4 if number else 0.0
        else:
            heat, color = value / largest if largest else 0.0, "var(--ll-5)"
        if isinstance(row, Leaf):
            lines, kind, act = _leaf_lines(row), "weights" if row.prepares else "node", "box"
            out = [t for t in row.node.outputs if t.outputs or id(t) in panel.tree.outputs]
            title = row.name
        else:
            times = f" ×{len(row.members)}" if len(row.members) > 1 else ""
            lines, kind, act = (
                [row.label + times, f"{sum(len(group.leaves) for group in row.members):,} nodes"],
                "group",
                "enter",
            )
            found = {i: t for (a, _), tensors in inner.items() if a == key for i, t in tensors.items()}
            out = list((found | {i: t for i, (t, k) in outward.items() if k == key}).values())
            title = panel.member(row).path
        notes = list(dict.fromkeys(map(kind_and_bytes, out)))
        notes = notes[:_NOTES] + ([f"and {len(notes) - _NOTES} more"] if len(notes) > _NOTES else [])
        lines += [number] if number else []
        boxes.append(Box(key, lines, notes, kind, act, title, heat, color, row is panel.leaf))
    return boxes


def _leaf_lines(leaf: Leaf) -> list[str]:
    """Operator, module, and the weights that are read directly."""
    module = leaf.label.rpartition("/")[0]
    named = leaf.label if "/" not in leaf.label and not leaf.label.startswith(leaf.node.op) else ""
    weights = [
        t for t in leaf.node.inputs if isinstance(t, gs.Constant) and len(t.shape) and max(t.shape, default=0) > 1
    ]
    lines = [leaf.node.op, *filter(None, (module or named,))]
    return [*lines, *(f"{t.name.rpartition('.')[2]} {kind_of(t)}" for t in weights[:2])]
