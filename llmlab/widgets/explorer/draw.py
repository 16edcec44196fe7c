"""The explorer's pictures: KL over size with the choice on it, and the map of layers × roles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from llmlab.evaluate.heatmap import Cell, grid, shades
from llmlab.evaluate.pareto import Point
from llmlab.widgets.explorer.mix import WIDE, Mix
from llmlab.widgets.markup import control, h

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 560, 260, 58, 14, 40, 16
_FLOOR = 0.3  # where no KL lies on the logarithmic axis: this part of the least that is more


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"


def front_picture(mix: Mix, budget: int) -> Markup:
    """Expected KL over size: what can be had, each recipe everywhere, the budget, and where the choice lies."""
    can = [(mix.wide_bytes - a.saved, a.cost) for a in mix.front]
    uniform = {name: mix.everywhere(name) for name in mix.recipes}
    here = (mix.size, mix.kl)
    costs = [kl for _, kl in [*can, here] if kl > 0] + [kl for kl, _ in uniform.values() if kl > 0]
    floor = _FLOOR * min(costs, default=1.0)
    sizes = [size for size, _ in can] + [size for _, size in uniform.values()] + [mix.wide_bytes, mix.size]
    x = _axis(min(sizes), max(sizes), _LEFT, _WIDTH - _RIGHT)
    log_y = _axis(math.log10(floor), math.log10(max(costs, default=1.0)) + 0.05, _HEIGHT - _BOTTOM, _TOP)

    def y(kl: float) -> float:
        return log_y(math.log10(max(kl, floor)))

    line = " ".join(f"{x(size):.1f},{y(kl):.1f}" for size, kl in can)
    at = x(min(max(budget, min(sizes)), max(sizes)))
    parts = [
        h("line", x1=_LEFT, y1=_HEIGHT - _BOTTOM, x2=_WIDTH - _RIGHT, y2=_HEIGHT - _BOTTOM, stroke="var(--ll-line)"),
        h("line", x1=_LEFT, y1=_TOP, x2=_LEFT, y2=_HEIGHT - _BOTTOM, stroke="var(--ll-line)"),
        *_powers(floor, max(costs, default=1.0), y),
        *(_text(x(s), _HEIGHT - _BOTTOM + 16, f"{s / 1e6:,.3g}") for s in _ends(min(sizes), max(sizes))),
        _text((_LEFT + _WIDTH) / 2, _HEIGHT - 4, "engine, MB"),
        h("g", _text(12, _HEIGHT / 2, "expected KL, nats a token"), transform=f"rotate(-90 12 {_HEIGHT / 2})"),
        h("polyline", points=line, fill="none", stroke="var(--ll-0)", stroke_width=2),
        h(
            "line",
            x1=f"{at:.1f}",
            y1=_TOP,
            x2=f"{at:.1f}",
            y2=_HEIGHT - _BOTTOM,
            stroke="var(--ll-5)",
            stroke_dasharray="4 3",
        ),
        _text(at + 4, _TOP + 8, "budget", "start"),
    ]
    for name, (kl, size) in uniform.items():
        parts.append(_dot(x(size), y(kl), "var(--ll-7)", f"{name} everywhere: KL {kl:.2g}, {megabytes(size)}"))
        parts.append(_text(x(size) + 8, y(kl) - 6, f"{name} everywhere", "start" if x(size) < _WIDTH * 0.6 else "end"))
    parts.append(_dot(x(here[0]), y(here[1]), "var(--ll-5)", f"your choice: KL {mix.kl:.2g}, {megabytes(mix.size)}", 7))
    title = f"KL {mix.kl:.2g} at {megabytes(mix.size)}; the line is the best that these parts can do"
    return h(
        "svg",
        h("title", title),
        parts,
        class_="plot",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width="100%",
        style=f"max-width:{_WIDTH}px",
        role="img",
    )


def measured_table(points: Sequence[Point], budget: int) -> Markup:
    """Engines that were measured, with those over the budget and those that another beats named as such."""
    if not points:
        return Markup("")
    rows = []
    for p in points:
        said = [
            text
            for text, true in (("over the budget", p.size > budget), (f"{p.beaten_by} beats it", p.beaten_by))
            if true
        ]
        numbers = [f"{p.kl:.2g}", f"{p.speed:,.1f}", f"{p.size / 1e6:,.2f}"]
        cells = [h("td", n, class_="number") for n in numbers]
        rows.append(
            h(
                "tr",
                h("td", p.name),
                cells,
                h("td", "; ".join(said) or "on the front"),
                class_="removed" if p.size > budget else None,
            )
        )
    heads = [h("th", text, class_="number") for text in ("KL", "tokens/s", "MB")]
    return h("table", h("tr", h("th", "measured"), heads, h("th", "")), rows)


def heat_table(mix: Mix, shown: str) -> Markup:
    """Layers × roles: what each part costs with the recipe `shown`, and what it is to get. A cell is a button."""
    cells = []
    for place, part in enumerate(mix.parts):
        row = mix.sensed(place, shown)
        cells.append(Cell(part.layer, part.role, 0.0 if row is None else row.kl.value, str(place)))
    found, layers, roles = grid(cells)
    heat = shades(cells)
    head = h("tr", h("th", "layer"), [h("th", role) for role in roles])
    rows = []
    for layer in layers:
        entries = [_cell(mix, found.get((layer, role)), heat) for role in roles]
        rows.append(h("tr", h("th", layer), entries))
    return h("div", h("table", head, rows, class_="map"), class_="wide", data_walk="grid")


def _cell(mix: Mix, cell: Cell | None, heat: Callable[[float], float]) -> Markup:
    if cell is None:
        return h("td", "")
    place = int(cell.text)
    part, chosen = mix.parts[place], mix.chosen(place)
    kept = place in mix.by_hand
    about = f"{part.key}: {chosen}{', by hand' if kept else ''}; KL {cell.value:.1e} alone"
    return h(
        "td",
        h("b", chosen),
        h("small", " by hand") if kept else "",
        h("br"),
        h("small", f"{cell.value:.1e}"),
        title=about,
        role="button",
        tabindex=0,
        aria_pressed="true" if kept else "false",
        class_="by-hand" if kept else WIDE if chosen == WIDE else None,
        style=f"background:color-mix(in srgb, var(--ll-5) {5 + 60 * heat(cell.value):.0f}%, transparent)",
        **control("put", str(place)),
    )


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _ends(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]


def _powers(floor: float, most: float, y: Callable[[float], float]) -> list[Markup]:
    powers = range(math.ceil(math.log10(floor)), math.floor(math.log10(most)) + 1)
    return [_text(_LEFT - 6, y(10.0**p) + 4, f"1e{p}", "end") for p in powers]


def _dot(x: float, y: float, color: str, title: str, radius: float = 5) -> Markup:
    return h("circle", h("title", title), cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, fill=color)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return h("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
