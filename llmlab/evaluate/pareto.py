"""Accuracy, speed and size at once: which of several engines another one beats, and pictures of it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.errors import require

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 16, 44
_FLOOR = 0.3  # where a KL of 0 lies on a logarithmic axis: this part of the smallest that is more
_BEST, _BEATEN = "#3a7ec8", "#999999"
_ABOUT = "KL to the reference, nats a token"
_SPEED = "decode at the smallest batch, tokens/s"


@dataclass(frozen=True)
class Point:
    """One engine on three axes: less KL, more tokens a second and fewer bytes are better."""

    name: str
    kl: float
    speed: float
    size: int
    low: float | None = None
    high: float | None = None
    beaten_by: str = ""
    text: str = ""
    """More to say where there is room."""

    def beats(self, other: Point) -> bool:
        """Whether nothing is better about the other and something worse (Pareto dominance)."""
        mine, theirs = (-self.kl, self.speed, -self.size), (-other.kl, other.speed, -other.size)
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def beaten(points: Sequence[Point]) -> dict[str, str]:
    """By name of each point that another beats on all axes: the name of the one that does, of several the most accurate."""
    found = {}
    for point in points:
        if better := [other for other in points if other.beats(point)]:
            found[point.name] = min(better, key=lambda p: (p.kl, p.size)).name
    return found


def svg(points: Sequence[Point]) -> str:
    """KL over speed, circles as large as the engines; hollow where another is better on all three axes."""
    if not points:
        return ""
    y_floor = _floor(points)
    heights = [max(p.kl, y_floor) for p in points] + [p.high for p in points if p.high]
    x = _scale([p.speed for p in points], _LEFT, _WIDTH - _RIGHT, log=False)
    y = _scale(heights, _HEIGHT - _BOTTOM, _TOP, log=True)
    parts = [
        f"<line x1='{_LEFT}' y1='{_HEIGHT - _BOTTOM}' x2='{_WIDTH - _RIGHT}' y2='{_HEIGHT - _BOTTOM}' stroke='#8888'/>",
        f"<line x1='{_LEFT}' y1='{_TOP}' x2='{_LEFT}' y2='{_HEIGHT - _BOTTOM}' stroke='#8888'/>",
        _label((_WIDTH + _LEFT) / 2, _HEIGHT - 6, _SPEED, "middle"),
        f"<g transform='rotate(-90 12 {_HEIGHT / 2})'>{_label(12, _HEIGHT / 2, _ABOUT, 'middle')}</g>",
    ]
    for value in _ticks([p.speed for p in points]):
        parts.append(_label(x(value), _HEIGHT - _BOTTOM + 16, f"{value:,g}", "middle"))
    for power in range(math.floor(math.log10(y_floor)), math.ceil(math.log10(max(heights))) + 1):
        if _TOP <= (at := y(10.0**power)) <= _HEIGHT - _BOTTOM:
            parts.append(_label(_LEFT - 6, at + 4, f"1e{power}", "end"))
            parts.append(f"<line x1='{_LEFT}' y1='{at:.1f}' x2='{_WIDTH - _RIGHT}' y2='{at:.1f}' stroke='#8883'/>")
    largest = max(p.size for p in points)
    for p in points:
        cx, cy, color = x(p.speed), y(max(p.kl, y_floor)), _BEATEN if p.beaten_by else _BEST
        if p.low is not None and p.high:
            bottom, top = y(max(p.low, y_floor)), y(max(p.high, y_floor))
            parts.append(f"<line x1='{cx:.1f}' y1='{bottom:.1f}' x2='{cx:.1f}' y2='{top:.1f}' stroke='{color}'/>")
        fill = "none" if p.beaten_by else f"{color}a0"
        title = f"<title>{html.escape(p.text or p.name)}</title>"
        radius = 4 + 10 * math.sqrt(p.size / largest)
        parts.append(
            f"<circle cx='{cx:.1f}' cy='{cy:.1f}' r='{radius:.1f}' fill='{fill}' stroke='{color}' stroke-width='2'>{title}</circle>"
        )
        side = "end" if cx > _WIDTH * 0.7 else "start"
        parts.append(_label(cx + (radius + 4) * (-1 if side == "end" else 1), cy + 4, p.name, side))
    about = f"role='img' aria-label='{_ABOUT} over {_SPEED}, of {len(points)} engines'"
    size = f"width='100%' style='max-width:{_WIDTH}px' viewBox='0 0 {_WIDTH} {_HEIGHT}'"
    return f"<svg {size} {about}>{''.join(parts)}</svg>"


def figure(points: Sequence[Point]) -> Any:
    """The same as a plotly figure. Raises MissingDependencyError without plotly."""
    objects = require("plotly.graph_objects", "notebook")
    floor = _floor(points)
    largest = max((p.size for p in points), default=1)
    picture = objects.Figure()
    for name, group in (
        ("nothing is better on all three", [p for p in points if not p.beaten_by]),
        ("another is better on all three", [p for p in points if p.beaten_by]),
    ):
        if not group:
            continue
        heights = [max(p.kl, floor) for p in group]
        hollow = group[0].beaten_by != ""
        picture.add_trace(
            objects.Scatter(
                x=[p.speed for p in group],
                y=heights,
                name=name,
                mode="markers+text",
                text=[p.name for p in group],
                textposition="top center",
                hovertext=[p.text or p.name for p in group],
                hoverinfo="text",
                marker={
                    "size": [12 + 28 * math.sqrt(p.size / largest) for p in group],
                    "color": _BEATEN if hollow else _BEST,
                    "symbol": "circle-open" if hollow else "circle",
                    "opacity": 0.75,
                },
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [max(0.0, (p.high or p.kl) - h) for p, h in zip(group, heights, strict=True)],
                    "arrayminus": [
                        max(0.0, h - max(floor, p.kl if p.low is None else p.low))
                        for p, h in zip(group, heights, strict=True)
                    ],
                },
            )
        )
    picture.update_layout(
        xaxis={"title": {"text": _SPEED}, "rangemode": "tozero"},
        yaxis={"title": {"text": f"{_ABOUT} (0 at the bottom)"}, "type": "log", "exponentformat": "power"},
        legend={"orientation": "h", "y": 1.12},
        margin={"t": 40, "b": 40, "l": 60, "r": 20},
        height=420,
    )
    return picture


def _floor(points: Sequence[Point]) -> float:
    return _FLOOR * min((p.kl for p in points if p.kl > 0), default=1.0)


def _scale(values: Sequence[float], start: float, end: float, *, log: bool) -> Callable[[float], float]:
    """From values to places between start and end; a linear one begins at 0."""
    shape = math.log10 if log else float
    low, high = (shape(min(values)) if log else 0.0), shape(max(values))
    high += 0.08 * (high - low) or 1.0
    return lambda value: start + (shape(value) - low) / (high - low) * (end - start)


def _ticks(values: Sequence[float]) -> list[float]:
    step = 10.0 ** math.floor(math.log10(max(*values, 1e-9)))
    step = step / 5 if max(values) / step < 2 else step / 2 if max(values) / step < 5 else step
    return [step * i for i in range(int(max(values) / step) + 1)]


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='12' fill='currentColor' text-anchor='{anchor}'>{html.escape(text)}</text>"
