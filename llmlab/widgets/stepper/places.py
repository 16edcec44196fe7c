"""Where a pass fired, alike layers as one, with the sketch of the first of them."""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.graph.reports.report import PassReport
from llmlab.graph.reports.sketch import Sketch


@dataclass(frozen=True)
class Place:
    """text: where; count: how many alike places it stands for. nodes: the anchor, then all that went and came at the first of them."""

    text: str
    count: int
    nodes: tuple[str, ...]
    removed: int
    added: int
    sketch: Sketch | None


def places_of(report: PassReport) -> list[Place]:
    sketched = {sketch.node: sketch for sketch in report.sketches}
    found = []
    for row in report.folded_places():
        first = report.places[row.first]
        nodes = (first.node, *first.removed, *first.added)
        sizes = len(first.removed), len([n for n in first.added if n in report.diff.added])
        found.append(Place(row.texts[0], row.count, nodes, *sizes, sketched.get(first.node)))
    return found
