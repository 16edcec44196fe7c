"""Pictures of small graphs: boxes with text, arrows with the tensors that go along them, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from llmlab.widgets.layout import Point, layout
from llmlab.widgets.markup import control, h

MOST = 150
"""Boxes that a picture may have."""
_LINE, _PAD, _CHAR, _SMALL = 15, 8, 6.6, 5.7  # pixels: a line, around the text, a letter, a letter of a note
_LONGEST = 44  # letters of a line


@dataclass(frozen=True)
class Box:
    """A box: lines of text, notes beneath it about what comes out, and what a click on it sends.

    kind: a class that says how it looks (node, group, outside, weights; added, removed, changed). heat: 0 to 1, how much of
    the overlay's colour it has. color: a CSS colour instead of that one.
    """

    key: str
    lines: Sequence[str]
    notes: Sequence[str] = ()
    kind: str = "node"
    act: str = ""
    title: str = ""
    heat: float = 0.0
    color: str = "var(--ll-5)"
    chosen: bool = False

    @property
    def size(self) -> Point:
        """With the notes."""
        inside = max((len(short(line)) for line in self.lines), default=1) * _CHAR + 2 * _PAD
        beneath = max((len(short(note)) for note in self.notes), default=0) * _SMALL + 8
        return max(inside, beneath, 44), self.height + (12 * len(self.notes) + 4 if self.notes else 0)

    @property
    def height(self) -> float:
        return _LINE * max(len(self.lines), 1) + _PAD


@dataclass(frozen=True)
class Arrow:
    """An edge between two boxes, by their keys; text: the tensors that go along it."""

    source: str
    target: str
    text: Sequence[str] = field(default=())


def short(text: str) -> str:
    """`text`, its middle left out where it is too long for a box."""
    return text if len(text) <= _LONGEST else f"{text[:20]}…{text[-(_LONGEST - 21) :]}"


def picture(boxes: Sequence[Box], arrows: Sequence[Arrow], label: str) -> Markup:
    """The graph, laid out from top to bottom. label: what it shows, for who can't see it."""
    if not boxes:
        return h("p", "nothing to draw", class_="soft")
    texts: dict[tuple[str, str], list[str]] = {}
    for arrow in arrows:
        texts.setdefault((arrow.source, arrow.target), []).extend(arrow.text)
    places = layout({box.key: box.size for box in boxes}, texts)
    lines = []
    for pair, points in places.routes.items():
        title = h("title", "; ".join(texts[pair][:8]))
        lines.append(h("path", title, d=_path(points), class_="arrow"))
        to_x, to_y = points[-1]
        lines.append(h("path", d=f"M{to_x - 3:.1f} {to_y - 6:.1f}h6l-3 6z", class_="tip"))
    width, height = round(places.width) + 4, round(places.height) + 4
    return h(
        "div",
        h(
            "svg",
            lines,
            [_box(box, places.corners[box.key]) for box in boxes],
            viewBox=f"-2 -2 {width} {height}",
            width=width,
            height=height,
            style=f"min-width:{round(0.8 * width)}px",
            role="group",
            aria_label=label,
        ),
        class_="wide graph",
        data_walk="column",
    )


def _box(box: Box, corner: Point) -> Markup:
    (width, _), (x, y) = box.size, corner
    middle = round(x + width / 2, 1)
    inside = min(max(max(len(short(line)) for line in box.lines) * _CHAR + 2 * _PAD, 44), width)
    heat = ""
    if box.heat > 0:
        heat = f"fill:color-mix(in srgb, {box.color} {round(8 + 72 * min(box.heat, 1))}%, var(--ll-page))"
    parts = [
        h("title", box.title) if box.title else None,
        h(
            "rect",
            x=round(middle - inside / 2, 1),
            y=round(y, 1),
            width=round(inside, 1),
            height=box.height,
            rx=4,
            style=heat or None,
        ),
    ]
    for i, line in enumerate(box.lines):
        at = round(y + _PAD / 2 + _LINE * (i + 0.75), 1)
        parts.append(h("text", short(line), x=middle, y=at, text_anchor="middle", class_="soft" if i else "name"))
    for i, note in enumerate(box.notes):
        at = round(y + box.height + 10 + 12 * i, 1)
        parts.append(h("text", short(note), x=middle, y=at, text_anchor="middle", class_="note"))
    look = f"box {box.kind}{' chosen' if box.chosen else ''}"
    said = ", ".join([*box.lines, *box.notes])
    if not box.act:
        return h("g", parts, class_=look)
    return h("g", parts, class_=look, tabindex=0, role="button", aria_label=said, **control(box.act, box.key))


def _path(points: Sequence[Point]) -> str:
    """A smooth line down through the points."""
    (x, y), *rest = points
    d = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in rest:
        if abs(to_x - x) < 0.5:
            d += f"V{to_y:.1f}"
        else:
            bend = (to_y - y) / 2
            d += f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return d
