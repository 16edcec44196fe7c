"""The tree at the left of the inspector: rows that unfold; in a picture, details that do."""

from __future__ import annotations

from markupsafe import Markup

from llmlab.widgets.inspector.hierarchy import Fold, Group, Leaf
from llmlab.widgets.inspector.overlays import PrecisionOverlay
from llmlab.widgets.inspector.state import InspectorState
from llmlab.widgets.markup import Attribute, control, h

_STATIC_LEAVES = 40


def tree(panel: InspectorState) -> Markup:
    rows = [_row(panel, depth, row) for depth, row in panel.rows()]
    return h(
        "div",
        rows or h("p", "no nodes", class_="soft"),
        role="tree",
        aria_label="layers, blocks and nodes",
        data_walk="column",
        class_="scroll",
        data_scroll="tree",
    )


def _row(panel: InspectorState, depth: int, row: Group | Fold | Leaf) -> Markup:
    level: dict[str, Attribute] = {
        "role": "treeitem",
        "tabindex": 0,
        "aria_level": depth,
        "style": f"padding-left:{14 * (depth - 1) + 4}px",
    }
    if isinstance(row, Leaf):
        chosen = row is panel.leaf
        name = [
            h("span", row.label, class_="mono"),
            h("small", f" {row.node.op}") if row.node.op not in row.label else None,
        ]
        cells = [h("span", name, class_="label", title=row.name), _number(panel, row)]
        look = f"row leaf{' chosen' if chosen else ''}{' weights' if row.prepares else ''}"
        return h("div", cells, class_=look, **_chosen(chosen, row.name), **level, **control("pick", row.name))
    group = panel.member(row) if isinstance(row, Fold) else row
    is_open = panel.is_unfolded(row)
    chosen = group is panel.group and panel.leaf is None
    cells = [
        h("span", "▾ " if is_open else "▸ ", _label(row), class_="label", title=group.path or None),
        _number(panel, row),
    ]
    return h(
        "div",
        cells,
        class_=f"row{' chosen' if chosen else ''}",
        aria_expanded="true" if is_open else "false",
        **_chosen(chosen, group.path),
        **level,
        **control("open", group.path),
    )


def _chosen(chosen: bool, key: str) -> dict[str, Attribute]:
    return {"aria_selected": "true", "data_reveal": key} if chosen else {}


def _label(row: Group | Fold) -> list[Markup | str]:
    count = len(row.members) if isinstance(row, Fold) else 1
    nodes = sum(1 for _ in row.leaves)
    times = h("span", f"×{count}", class_="badge") if count > 1 else Markup("")
    each = f"{nodes // count} nodes each" if count > 1 else f"{nodes:,} node{'' if nodes == 1 else 's'}"
    return [h("b", row.label), Markup(" "), times, h("small", f" {each}")]


def _number(panel: InspectorState, row: Group | Fold | Leaf) -> Markup:
    """The overlay's number, and a bar of its share."""
    overlay = panel.overlay
    found = overlay.at(row)
    if isinstance(overlay, PrecisionOverlay):
        mark = h("span", class_="swatch", style=f"background:{found.color}") if found.color else None
        return h("span", mark, found.text.removeprefix("weights "), class_="value")
    share = found.value / panel.whole if panel.whole else 0.0
    filled = h("span", h("span", style=f"width:{min(share, 1):.1%}"), class_="meter") if share else None
    return h("span", found.text, filled, class_="value")


def typical_layer(panel: InspectorState) -> Group:
    """The layer that stands for most others; the whole model where there are no layers."""
    folds = [row for row in panel.tree.root.rows if isinstance(row, Fold)]
    most = max(folds, key=lambda f: (len(f.members), sum(1 for _ in f.leaves)), default=None)
    return panel.tree.root if most is None else panel.member(most)


def static_tree(panel: InspectorState) -> Markup:
    """The whole tree down to blocks, and the first nodes of each block folded."""
    return h("div", [_static(panel, row, 1) for row in panel.tree.root.rows] or h("p", "no nodes", class_="soft"))


def _static(panel: InspectorState, row: Fold | Leaf, depth: int) -> Markup:
    if isinstance(row, Leaf):
        return h(
            "div",
            h("code", row.label),
            h("small", f" {row.node.op}") if row.node.op not in row.label else None,
            Markup(" "),
            _number(panel, row),
        )
    group = panel.member(row)
    shown = group.rows[:_STATIC_LEAVES]
    more = h("div", h("small", f"… {len(group.rows) - len(shown)} more")) if len(group.rows) > len(shown) else None
    inside = [_static(panel, r, depth + 1) for r in shown] if depth < 3 else []
    line = [*_label(row), Markup(" "), _number(panel, row)]
    is_open = depth == 1 and len(row.members) > 1
    return h("details", h("summary", line), h("div", inside, more, class_="inside"), open=is_open)
