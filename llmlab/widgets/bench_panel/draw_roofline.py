"""The machine's roofline, with the engine's steps on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from markupsafe import Markup

from llmlab.evaluate.roofline import Point, Roofline
from llmlab.widgets.bench_panel.state import BenchState
from llmlab.widgets.markup import Attribute, h

_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BELOW = 560, 270, 50, 16, 8, 36  # pixels: the picture, and around its axes
_LETTER, _LINE = 6.6, 13
Scale: TypeAlias = Callable[[float], float]
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def roofline(panel: BenchState) -> Markup:
    """Operations a second over operations a byte, both logarithmic: the machine's ceilings and the engine's steps."""
    if panel.roofline is None:
        return h("p", panel.note, class_="soft") if panel.note else Markup("")
    roof = panel.roofline
    rows = [
        h(
            "tr",
            h("td", point.label),
            h("td", f"{point.intensity:,.1f}", class_="number"),
            h("td", f"{point.flops_per_s / 1e9:,.2f}", class_="number"),
            h("td", f"{point.flops_per_s / roof.limit(point.intensity):.0%}", class_="number"),
            h("td", f"{point.bytes / point.seconds / 1e9:,.2f}", class_="number"),
            h("td", "memory" if point.intensity < roof.ridge else "arithmetic"),
        )
        for point in panel.points
    ]
    heads = ("step", "operations a byte", "Gop/s", "of the float32 roof", "GB/s", "limited by")
    table = h("table", h("tr", [h("th", head, scope="col") for head in heads]), rows) if rows else None
    said = (
        f"This machine reads {roof.bytes_per_s / 1e9:.1f} GB/s and does {roof.flops_per_s / 1e9:.0f} Gop/s in float32, "
        f"{roof.int8_ops_per_s / 1e9:.0f} in int8; below {roof.ridge:.1f} operations a byte, memory is the limit."
    )
    above = [p.label for p in panel.points if p.flops_per_s > p.intensity * roof.bytes_per_s]
    cached = (
        f"Above the line of the memory: {', '.join(above)}. What is read there fits the processor's caches."
        if above
        else ""
    )
    note = h("p", " ".join(filter(None, (cached, panel.note)))) if cached or panel.note else None
    return h(
        "div",
        h("h4", "Roofline"),
        h("p", said),
        h("div", _plot(panel.points, roof), h("div", table, note, class_="wide"), class_="columns"),
        h("p", h("small", roof.method)),
    )


def _plot(points: Sequence[Point], roof: Roofline) -> Markup:
    across = [roof.ridge, *(p.intensity for p in points)]
    leftmost = min(across) / 2
    up = [roof.int8_ops_per_s, roof.flops_per_s, roof.bytes_per_s * leftmost, *(p.flops_per_s for p in points)]
    low_x, high_x, low_y, high_y = leftmost, max(across) * 4, min(up) / 1.6, max(up) * 1.6
    x = _logarithmic(low_x, high_x, _LEFT, _WIDE - _RIGHT)
    y = _logarithmic(low_y, high_y, _HIGH - _BELOW, _TOP)
    said = "Roofline: " + "; ".join(
        f"{p.label}: {p.intensity:.1f} operations a byte, {_ops(p.flops_per_s)}op/s" for p in points
    )
    name: dict[str, Attribute] = {"x": (_WIDE + _LEFT) / 2, "y": _HIGH - 6, "text_anchor": "middle", "class_": "soft"}
    parts = [
        *_grid(low_x, high_x, low_y, high_y, x, y),
        *_ceilings(roof, low_x, high_x, x, y),
        *_points(points, x, y),
        h("text", "operations a byte", **name),
    ]
    return h(
        "svg",
        h("title", said),
        parts,
        class_="plot",
        viewBox=f"0 0 {_WIDE} {_HIGH}",
        width=_WIDE,
        role="img",
        aria_label=said,
    )


def _logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    per = (end - start) / math.log10(high / low)
    return lambda value: start + math.log10(value / low) * per


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the two, and what is between these where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = math.log10(high / low) < 2.5
    values = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if few else (1,))]
    return [value for value in values if low <= value <= high]


def _grid(low_x: float, high_x: float, low_y: float, high_y: float, x: Scale, y: Scale) -> list[Markup]:
    bottom, right = _HIGH - _BELOW, _WIDE - _RIGHT
    parts = []
    for value in _ticks(low_x, high_x):
        at = f"{x(value):.1f}"
        parts.append(h("line", x1=at, x2=at, y1=_TOP, y2=bottom, stroke="var(--ll-line)"))
        parts.append(h("text", f"{value:g}", x=at, y=bottom + 14, text_anchor="middle", class_="soft"))
    for value in _ticks(low_y, high_y):
        at = f"{y(value):.1f}"
        parts.append(h("line", x1=_LEFT, x2=right, y1=at, y2=at, stroke="var(--ll-line)"))
        parts.append(h("text", _ops(value), x=_LEFT - 4, y=f"{y(value) + 4:.1f}", text_anchor="end", class_="soft"))
    return parts


def _ceilings(roof: Roofline, low_x: float, high_x: float, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    near = abs(y(roof.flops_per_s) - y(roof.int8_ops_per_s)) < _LINE + 1
    lower = min(roof.flops_per_s, roof.int8_ops_per_s)
    for ceiling, name, dash in ((roof.flops_per_s, "float32", None), (roof.int8_ops_per_s, "int8", "6 3")):
        bend = ceiling / roof.bytes_per_s
        if bend >= high_x:
            continue
        start = f"M{x(low_x):.1f},{y(roof.bytes_per_s * low_x):.1f}"
        path = f"{start} L{x(bend):.1f},{y(ceiling):.1f} L{_WIDE - _RIGHT},{y(ceiling):.1f}"
        parts.append(h("path", d=path, fill="none", stroke="var(--ll-ink)", stroke_width=1.5, stroke_dasharray=dash))
        place = y(ceiling) + _LINE if near and ceiling == lower else y(ceiling) - 4
        parts.append(h("text", name, x=_WIDE - _RIGHT - 2, y=f"{place:.1f}", text_anchor="end"))
    return parts


def _points(points: Sequence[Point], x: Scale, y: Scale) -> list[Markup]:
    """A dot for each, and its name where it covers neither a dot nor another name, if there is such a place."""
    dots = [(x(p.intensity), y(p.flops_per_s)) for p in points]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in dots]
    parts = [
        h("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=5, fill=f"var(--ll-{number % 8})")
        for number, (px, py) in enumerate(dots)
    ]
    for point, dot in zip(points, dots, strict=True):
        box = _place(len(point.label) * _LETTER, dot, taken)
        taken.append(box)
        parts.append(h("text", point.label, x=f"{box[0]:.1f}", y=f"{box[3] - 3:.1f}"))
    return parts


def _place(width: float, dot: tuple[float, float], taken: Sequence[Box]) -> Box:
    """Where a name of this width stands beside its dot: the first place that is inside and free, else the one that covers least."""
    px, py = dot
    found: list[tuple[float, Box]] = []
    for left in (px + 9, px - 9 - width):
        for base in (py + 14, py - 6, py + 27, py - 19):
            box = (left, base - _LINE + 2, left + width, base + 3)
            inside = min(box[0] - _LEFT, box[1] - _TOP, _WIDE - _RIGHT - box[2], _HIGH - _BELOW - box[3]) >= 0
            found.append((sum(_overlap(box, other) for other in taken) + (0 if inside else 1000), box))
    return min(found, key=lambda pair: pair[0])[1]


def _overlap(one: Box, other: Box) -> float:
    """Area that two boxes (left, top, right, bottom) share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)


def _ops(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:g} {name}" if value / unit < 1000 else f"{value / unit:.0f} {name}"
    return f"{value:g} "
