"""Which engine beats which on accuracy, speed and size, and the pictures of it."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from llmlab.errors import MissingDependencyError
from llmlab.evaluate.pareto import Point, beaten, figure, svg

POINTS = [
    Point("wide", 0.0, 10, 400),
    Point("int8", 1e-4, 20, 100, 5e-5, 2e-4),
    Point("int4", 2e-3, 30, 60, 1e-3, 3e-3),
    Point("bad int8", 1e-3, 20, 100),
    Point("slow int4", 2e-3, 12, 60),
]


def test_beaten_on_all_three() -> None:
    assert beaten(POINTS) == {"bad int8": "int8", "slow int4": "int4"}
    assert beaten([Point("a", 1, 1, 1), Point("b", 1, 1, 1)]) == {}, "the same is not better"
    assert beaten([Point("a", 1, 1, 1), Point("b", 0, 1, 2)]) == {}, "better on one, worse on another"


def test_against_brute_force() -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        points = [Point(str(i), *map(float, random.integers(0, 4, 2)), int(random.integers(0, 4))) for i in range(9)]
        axes = {p.name: np.array([-p.kl, p.speed, -p.size]) for p in points}
        for p in points:
            better = [
                q.name for q in points if (axes[q.name] >= axes[p.name]).all() and (axes[q.name] > axes[p.name]).any()
            ]
            assert (p.name in beaten(points)) == bool(better)
            assert beaten(points).get(p.name, better[0] if better else "") in better or not better


def marked() -> list[Point]:
    worse = beaten(POINTS)
    return [Point(**{**vars(p), "beaten_by": worse.get(p.name, "")}) for p in POINTS]


def test_the_drawing_has_every_engine_at_its_place() -> None:
    drawn = ET.fromstring(svg(marked()))
    circles = {c.find("title").text: c for c in drawn.iter("circle")}  # type: ignore[union-attr]
    assert set(circles) == {p.name for p in POINTS}
    place = {name: (float(c.get("cx")), float(c.get("cy")), float(c.get("r"))) for name, c in circles.items()}  # type: ignore[arg-type]
    assert place["wide"][0] < place["int8"][0] < place["int4"][0], "faster is further right"
    assert place["wide"][1] > place["int8"][1] > place["int4"][1], "less KL is further down, 0 at the bottom"
    assert place["wide"][2] > place["int8"][2] > place["int4"][2]
    assert {name for name, c in circles.items() if c.get("fill") == "none"} == {"bad int8", "slow int4"}
    assert all(0 <= x <= 640 and 0 <= y <= 320 for x, y, _ in place.values())


@pytest.mark.parametrize("points", [[], [Point("<one>", 0.0, 5.0, 7)], [Point("a", 0, 1, 1), Point("b", 0, 1, 1)]])
def test_few_points_and_hostile_names(points: list[Point]) -> None:
    text = svg(points)
    assert "<one>" not in text and (not points or ET.fromstring(text) is not None)


def test_the_plotly_figure_says_the_same() -> None:
    found = figure(marked())
    best, worse = found.data
    assert list(best.text) == ["wide", "int8", "int4"] and list(worse.text) == ["bad int8", "slow int4"]
    assert best.y[1] == 1e-4 and 0 < best.y[0] < 1e-4 and found.layout.yaxis.type == "log"
    assert best.error_y.array[1] == pytest.approx(1e-4) and best.error_y.arrayminus[1] == pytest.approx(5e-5)
    sizes = best.marker.size
    assert sizes[0] > sizes[1] > sizes[2]
    assert len(figure([]).data) == 0


def test_without_plotly_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llmlab\[notebook\]'"):
        figure(POINTS)
