"""Numbers by layer and role as a heat map: SVG without scripts, and a table for a terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmlab.graph.reports.render import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE, _HIGH, _LEFT, _TOP = 76, 22, 64, 24
_OUTSIDE = "–"
"""In place of a layer's number."""


@dataclass(frozen=True)
class Cell:
    """layer: None outside of layers. value: at least 0. text: what to say of it where there is room."""

    layer: int | None
    role: str
    value: float
    text: str = ""


def heat_map(cells: Sequence[Cell], title: str, note: str = "") -> str:
    """An HTML page's part: a drawing with a row for each layer and a column for each role; colours follow the logarithm."""
    found, layers, roles = grid(cells)
    shade = shades(cells)
    parts = [_text(_LEFT + (i + 0.5) * _WIDE, _TOP - 8, role) for i, role in enumerate(roles)]
    for row, layer in enumerate(layers):
        y = _TOP + row * _HIGH
        parts.append(_text(_LEFT / 2, y + 15, layer))
        for column, role in enumerate(roles):
            if (cell := found.get((layer, role))) is not None:
                x, heat = _LEFT + column * _WIDE, shade(cell.value)
                parts.append(
                    f"<rect x='{x}' y='{y}' width='{_WIDE - 2}' height='{_HIGH - 2}' rx='2' fill='#d9541e' "
                    f"fill-opacity='{0.06 + 0.74 * heat:.2f}'><title>{html.escape(cell.text)}</title></rect>"
                )
                parts.append(_text(x + _WIDE / 2, y + 15, f"{cell.value:.1e}"))
    width, height = _LEFT + len(roles) * _WIDE, _TOP + len(layers) * _HIGH
    drawing = f"<svg width='100%' style='max-width:{width}px' viewBox='0 0 {width} {height}'>{''.join(parts)}</svg>"
    below = f"<div><small>{html.escape(note)}</small></div>" if note else ""
    return f"<div><div><b>{html.escape(title)}</b></div>{drawing}{below}</div>"


def table(cells: Sequence[Cell], title: str, note: str = "") -> RenderableType:
    """The same for a terminal; the hottest fifth stands out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found, layers, roles = grid(cells)
    shade = shades(cells)
    drawn = Table(
        title=plain(title), caption=plain(note), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    drawn.add_column("layer", justify="right")
    for role in roles:
        drawn.add_column(role, justify="right")
    for layer in layers:
        row = []
        for role in roles:
            cell = found.get((layer, role))
            heat = 0.0 if cell is None else shade(cell.value)
            style = "bold red" if heat > 0.8 else "yellow" if heat > 0.5 else "dim"
            row.append(Text("" if cell is None else f"{cell.value:.1e}", style))
        drawn.add_row(layer, *row)
    return drawn


def grid(cells: Sequence[Cell]) -> tuple[dict[tuple[str, str], Cell], list[str], list[str]]:
    """Cells by (layer, role), layers from first to last with what is outside of them behind, roles as they come."""
    numbers = sorted({cell.layer for cell in cells if cell.layer is not None})
    layers = [*map(str, numbers), *([_OUTSIDE] if any(cell.layer is None for cell in cells) else [])]
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        layer = _OUTSIDE if cell.layer is None else str(cell.layer)
        role, count = cell.role, 1
        while (layer, role) in found:  # experts, or roles that no name tells apart
            count += 1
            role = f"{cell.role} {count}"
        found[layer, role] = cell
    return found, layers, list(dict.fromkeys(role for _, role in found))


class shades:
    """From a value to how hot it is, 0 to 1, on a logarithmic scale over one decade at least."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        found = [cell.value for cell in cells if cell.value > 0]
        self._high = math.log10(max(found, default=1.0))
        self._low = min(math.log10(min(found, default=1.0)), self._high - 1)

    def __call__(self, value: float) -> float:
        if value <= 0:
            return 0.0
        return min(1.0, max(0.0, (math.log10(value) - self._low) / (self._high - self._low)))


def _text(x: float, y: float, text: str) -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' font-size='12' fill='currentColor' text-anchor='middle'>{html.escape(text)}</text>"
