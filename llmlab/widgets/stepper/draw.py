"""Parts of the stepper: numbers, source, places, near misses, the two sides, changes in words, and the table of all passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from llmlab.graph.reports.diff import KINDS, GraphDiff
from llmlab.graph.reports.fold import block_of, fold
from llmlab.graph.reports.render import SIGNS
from llmlab.graph.reports.report import NearMiss, PassReport
from llmlab.graph.reports.sketch import Sketch, SketchNode, maker
from llmlab.widgets.markup import Child, control, h
from llmlab.widgets.picture import Arrow, Box, picture
from llmlab.widgets.stepper.places import Place, places_of
from llmlab.widgets.stepper.source import source_lines

_SHOWN = 60  # rows of a list
_LINES = 80  # of changes in words


def numbers(report: PassReport) -> Markup:
    facts = [
        f"{report.rewrites} of {report.matches} places rewritten",
        f"{report.nodes_before:,} → {report.nodes_after:,} nodes",
        f"{report.seconds:.2f} s",
    ]
    before, after = report.weight_bytes_before, report.weight_bytes_after
    if before != after:
        facts.append(f"weights {before / 1e6:.1f} → {after / 1e6:.1f} MB")
    counts = [f"{len(getattr(report.diff, kind))} {kind}" for kind in KINDS if getattr(report.diff, kind)]
    facts += [f"nodes: {', '.join(counts)}"] if counts else ["nothing changed"]
    return h("p", " · ".join(facts))


def source(report: PassReport) -> tuple[str, Markup | None]:
    """(file and line, its text in a fold)."""
    first, lines = source_lines(report.source)
    if not lines:
        return report.source, None
    text = "\n".join(f"{first + i:>4}  {line}" for i, line in enumerate(lines))
    folded = h("details", h("summary", "source"), h("pre", h("code", text), class_="wide"), data_keep="source")
    return report.source, folded


def places(found: Sequence[Place], chosen: int) -> Markup:
    if not found:
        return h("div", h("h4", "where it fired"), h("p", "nowhere", class_="soft"))
    rows = [
        h(
            "div",
            h("span", h("code", place.text), " ", _times(place.count)),
            h("small", f"{place.removed} removed, {place.added} added"),
            class_=f"row{' chosen' if at == chosen else ''}",
            role="option",
            tabindex=0,
            aria_selected="true" if at == chosen else "false",
            **control("place", str(at)),
        )
        for at, place in enumerate(found[:_SHOWN])
    ]
    more = h("small", f"and {len(found) - _SHOWN} more") if len(found) > _SHOWN else None
    listed = h(
        "div",
        rows,
        role="listbox",
        aria_label="where it fired",
        data_walk="column",
        class_="scroll few",
        data_scroll="places",
    )
    return h("div", h("h4", "where it fired"), listed, more)


def misses(found: Iterable[NearMiss]) -> Markup:
    rows = fold((miss.node, miss.reason) for miss in found)
    lines = [h("li", h("code", row.texts[0]), " ", _times(row.count), f": {row.texts[1]}") for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        lines.append(h("li", f"and {len(rows) - _SHOWN} more"))
    listed = h("ul", lines, class_="scroll few") if lines else h("p", "nothing", class_="soft")
    return h("div", h("h4", "what nearly matched, and why not"), listed)


def _times(count: int) -> Markup:
    return h("span", f"×{count}", class_="badge") if count > 1 else Markup("")


def sides(report: PassReport, place: Place) -> Markup:
    """The surroundings of a place before and after the pass."""
    if place.sketch is None:
        return h("p", "No picture of this place was recorded; what changed is listed below.", class_="soft")
    columns = []
    for name, nodes in (("before", place.sketch.before), ("after", place.sketch.after)):
        boxes, arrows = _graph(report.diff, nodes, block_of(place.nodes[0]))
        drawn = picture(boxes, arrows, f"{name} {report.title}") if boxes else h("p", "nothing", class_="soft")
        columns.append(h("div", h("h4", name), h("div", drawn, class_="scroll tall", data_scroll=name)))
    legend = [h("span", f" {sign} {word} ", class_=word) for sign, (word, _, _) in SIGNS.items()]
    left = f" {place.sketch.left_out} more nodes aren't drawn." if place.sketch.left_out else ""
    return h(
        "div", h("small", *(m for badge in legend for m in (badge, " ")), left), h("div", columns, class_="columns")
    )


def _graph(diff: GraphDiff, nodes: Sequence[SketchNode], block: str) -> tuple[list[Box], list[Arrow]]:
    """Boxes and arrows; names without `block`, which is the one that the place lies in."""
    by_name = {node.name: node for node in nodes}
    boxes, arrows = [], []
    for node in nodes:
        kind = next((kind for kind in KINDS if node.name in getattr(diff, kind)), "kept")
        sign = next((s for s, (word, _, _) in SIGNS.items() if word == kind), "")
        label = node.name.removeprefix(block).lstrip("./")
        lines = [f"{sign} {node.op}".strip(), *([label] if label != node.op else []), *([kind] if sign else [])]
        given = [label for label in node.inputs if label and not maker(label, by_name) and "/" not in label]
        lines += [", ".join(given[:2]) + (f" and {len(given) - 2} more" if len(given) > 2 else "")] if given else []
        boxes.append(Box(node.name, lines, list(dict.fromkeys(node.outputs))[:2], kind, title=node.name))
        for label in node.inputs:
            if source := maker(label, by_name):
                slot = label[len(source) + 1 :]
                outputs = by_name[source].outputs
                index = int(slot) if slot.isdecimal() else 0
                arrows.append(Arrow(source, node.name, [outputs[index] if index < len(outputs) else label]))
    return boxes, arrows


def changes(report: PassReport, place: Place | None) -> Markup:
    """What changed, in words: at the place, then everywhere."""
    parts = []
    if place is not None:
        here = set(place.nodes) | (_names(place.sketch) if place.sketch is not None else set())
        parts.append(
            _words(
                f"what changed there{' (in the first of them)' if place.count > 1 else ''}",
                report.diff.at(here.__contains__),
                True,
            )
        )
    if report.diff:
        parts.append(_words("everything that this pass changed", report.diff, False))
    return h("div", parts)


def _names(sketch: Sketch) -> set[str]:
    return {node.name for node in (*sketch.before, *sketch.after)}


def _words(title: str, diff: GraphDiff, is_open: bool) -> Markup | None:
    if not diff:
        return None
    lines: list[Markup] = []
    for block in diff.blocks():
        lines.append(h("div", h("b", block.texts[0]), _times(block.count)))
        lines += [_line(text) for text in block.texts[1:]]
    tensors = diff.tensor_lines()
    if tensors:
        lines.append(h("div", h("b", "inputs, outputs and weights")))
        lines += [_line(row.texts[0] + row.times) for row in tensors]
    more = h("div", h("small", f"and {len(lines) - _LINES} more lines")) if len(lines) > _LINES else None
    body = h("div", lines[:_LINES], more, class_="wide")
    return h("details", h("summary", title), body, open=is_open, data_keep=title[:12])


def _line(text: str) -> Markup:
    if text[:1] not in SIGNS:
        return h("div", h("small", text), class_="inside")
    word = SIGNS[text[0]][0]
    return h("div", h("span", h("small", word), " ", h("code", text[2:]), class_=word), class_="inside")


def table(reports: Sequence[PassReport]) -> Markup:
    """All passes with what they did, each unfolding, for a picture of the panel."""
    rows = []
    for at, report in enumerate(reports, 1):
        found = places_of(report)
        parts = [h("p", report.summary)]
        parts += [
            h("div", h("code", p.text), _times(p.count), h("small", f" {p.removed} removed, {p.added} added"))
            for p in found[:12]
        ]
        parts += [h("div", h("small", f"and {len(found) - 12} more places"))] if len(found) > 12 else []
        parts += [misses(report.near_misses)] if report.near_misses else []
        parts += [h("p", h("code", report.source))] if report.source else []
        cell = h("details", h("summary", h("b", report.title)), parts)
        operators = ", ".join(f"{op} {change:+d}" for op, change in report.diff.ops.items())
        cells: tuple[Child, ...] = (
            at,
            cell,
            f"{report.rewrites} of {report.matches}",
            f"{report.nodes_before:,} → {report.nodes_after:,}",
            operators,
        )
        rows.append(h("tr", *(h("td", c, class_="tight" if at < 4 else None) for at, c in enumerate(cells))))
    head = h("tr", *(h("th", name) for name in ("", "pass", "rewritten", "nodes", "operators that came and went")))
    return h("div", h("table", head, rows), class_="wide static-only")
