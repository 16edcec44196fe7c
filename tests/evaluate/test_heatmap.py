"""Heat maps: every number at its place, hotter where it is more."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET

from rich.console import Console

from llmlab.evaluate.heatmap import Cell, grid, heat_map, table

CELLS = [
    Cell(n, role, 10.0 ** -(5 - n) * (i + 1), f"{n} {role}") for n in (0, 1, 10) for i, role in enumerate(["q", "down"])
]
CELLS += [Cell(None, "head", 0.0, "<head>")]


def test_rows_and_columns() -> None:
    cells, layers, roles = grid(CELLS)
    assert layers == ["0", "1", "10", "–"] and roles == ["q", "down", "head"] and len(cells) == 7
    assert grid([Cell(0, "up", 1.0), Cell(0, "up", 2.0)])[2] == ["up", "up 2"], "two of one role in a layer"


def test_the_drawing_is_hotter_where_more_is_lost() -> None:
    page = ET.fromstring(heat_map(CELLS, "<title>", "note"))
    heat = {r.find("title").text: float(r.get("fill-opacity", "")) for r in page.iter("rect")}  # type: ignore[union-attr]
    assert set(heat) == {c.text for c in CELLS}
    assert heat["<head>"] < heat["0 q"] + 1e-9 < heat["1 q"] < heat["10 q"] <= heat["10 down"]
    texts = {t.text for t in page.iter("text")}
    assert {"q", "down", "head", "10", "–", "1.0e-05", "0.0e+00"} <= texts


def test_the_terminal_shows_the_same_within_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(CELLS, "title", "note"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1.0e-05" in shown and "note" in shown and max(map(len, shown.splitlines())) <= 80


def test_nothing_but_zeros() -> None:
    assert "0.0e+00" in heat_map([Cell(0, "q", 0.0)], "t")
