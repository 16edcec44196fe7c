"""What a pass did to a graph: its report, and the list of them that a graph carries."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from llmlab.graph.reports.diff import GraphDiff, number, text
from llmlab.graph.reports.fold import Folded, fold, layer_of
from llmlab.graph.reports.render import SIGNS, details, html_table, plain
from llmlab.graph.reports.sketch import Sketch

_WIDE = 90  # columns of a terminal from which on all of a history's numbers find room beside the names


@dataclass(frozen=True)
class NearMiss:
    """A place where the pattern was found but the rewrite did not apply, and why."""

    node: str
    reason: str


def folded(misses: Iterable[NearMiss]) -> list[str]:
    """A line for each near miss, those that differ in the number of their layer alone as one."""
    return [f"not {m.texts[0]}: {m.texts[1]}{m.times}" for m in fold((miss.node, miss.reason) for miss in misses)]


@dataclass(frozen=True)
class Rewrite:
    """A place where a pass did its surgery: the node that its pattern is anchored at."""

    node: str
    added: tuple[str, ...] = ()
    """Names of the nodes that this rewrite added; some may be gone again in the end."""
    removed: tuple[str, ...] = ()
    """Names of the nodes that went and were nearer to this rewrite than to any other of the pass."""

    @property
    def layer(self) -> str:
        return layer_of(self.node)


@dataclass(frozen=True)
class PassReport:
    """What one run of a pass did to one graph."""

    name: str
    summary: str
    matches: int
    """How often the pattern was found: `rewrites` and near misses together."""
    rewrites: int
    near_misses: tuple[NearMiss, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    diff: GraphDiff = field(default_factory=GraphDiff, repr=False)
    places: tuple[Rewrite, ...] = field(default=(), repr=False)
    run: int = 1
    """Which run of this pass on this graph it was, from 1."""
    source: str = ""
    """File and line of the pass's class, such as `llmlab/graph/passes/fuse_rope.py:21`; empty if there is no file."""
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    sketches: tuple[Sketch, ...] = field(default=(), repr=False)
    """What some of the places looked like before and after."""

    @property
    def title(self) -> str:
        """The name, with the number of the run from the second on: `remove_no_ops #2`."""
        return self.name if self.run == 1 else f"{self.name} #{self.run}"

    def details(self) -> str:
        """What there is to say beyond places and near misses, as HTML."""
        return ""

    def folded_places(self) -> list[Folded]:
        """(node, nodes that went, nodes that came) of the rewrites, layers that are alike as one."""
        return fold((p.node, ", ".join(p.removed), ", ".join(p.added)) for p in self.places)

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in (*_TEXTS, *_NUMBERS, "seconds")},
            "near_misses": [{"node": m.node, "reason": m.reason} for m in self.near_misses],
            "places": [{"node": p.node, "added": list(p.added), "removed": list(p.removed)} for p in self.places],
            "sketches": [sketch.to_dict() for sketch in self.sketches],
            "diff": self.diff.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassReport:
        """What `to_dict` gave. Raises TypeError, KeyError, ValueError or AttributeError where it is something else."""
        seconds = data["seconds"]
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"{seconds!r} is not a time")
        kinds = {**dict.fromkeys(_TEXTS, text), **dict.fromkeys(_NUMBERS, number)}
        fields: dict[str, Any] = {
            name: kind(data[name]) for name, kind in kinds.items() if name in data or name not in _SINCE_0_2
        }
        return cls(
            **fields,
            near_misses=tuple(NearMiss(text(m["node"]), text(m["reason"])) for m in data["near_misses"]),
            places=tuple(
                Rewrite(text(p["node"]), tuple(map(text, p["added"])), tuple(map(text, p["removed"])))
                for p in data.get("places", ())
            ),
            sketches=tuple(Sketch.from_dict(s) for s in data.get("sketches", ())),
            diff=GraphDiff.from_dict(data["diff"]),
            seconds=seconds,
        )

    def __str__(self) -> str:
        line = (
            f"{self.title}: {self.rewrites} of {self.matches} rewritten, {self.nodes_before} → {self.nodes_after} nodes"
        )
        return "\n  ".join([line, *folded(self.near_misses)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        return History([self]).__rich_console__(console, options)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return History([self])._repr_mimebundle_()


_TEXTS = ("name", "summary", "source")
_NUMBERS = ("matches", "rewrites", "nodes_before", "nodes_after", "run", "weight_bytes_before", "weight_bytes_after")
_SINCE_0_2 = ("source", "run", "weight_bytes_before", "weight_bytes_after")
"""What reports that llmlab 0.1 saved don't have."""


class History(list[PassReport]):
    """The reports of the passes that made a graph, in order."""

    def __str__(self) -> str:
        return "\n".join(str(report) for report in self) or "no pass has run"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        return {"passes": [report.to_dict() for report in self]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield _text(self, options.max_width)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": _html(self)}


def _text(history: History, width: int) -> RenderableType:
    if not history:
        return Text("no pass has run")
    columns = ("pass", "rewritten", "nodes", "weights", "time")[: 5 if width >= _WIDE else 3]
    table = Table(*columns, title="Passes")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].overflow = "fold"
    for report in history:
        what = plain(report.title, "bold" if report.rewrites else "")
        if report.summary and report.run == 1:
            what.append("\n").append_text(plain(report.summary, "dim"))
        for miss in folded(report.near_misses):
            what.append("\n").append_text(plain(miss, "yellow"))
        table.add_row(what, *_numbers(report)[: len(columns) - 1])
    return table


def _html(history: History) -> str:
    head = ("pass", "rewritten", "nodes", "operators that came and went", "weights", "time")
    return html_table(head, map(_report_cells, history))


def _report_cells(report: PassReport) -> list[str]:
    misses = [f"<small>{html.escape(miss)}</small>" for miss in folded(report.near_misses)]
    places = [
        f"<small>{html.escape(place.texts[0] + place.times)}"
        + "".join(
            f"<br>&emsp;<span style='background:{SIGNS[sign][2]}'>{SIGNS[sign][0]}</span> {html.escape(names)}"
            for sign, names in (("-", place.texts[1]), ("+", place.texts[2]))
            if names
        )
        + "</small>"
        for place in report.folded_places()
    ]
    operators = ", ".join(f"{op} {change:+d}" for op, change in report.diff.ops.items())
    what = (
        f"<b>{html.escape(report.title)}</b><br><small>{html.escape(report.summary)}</small>"
        + details(_count(len(report.near_misses), "near miss", "near misses"), misses)
        + details(f"{_count(report.rewrites, 'rewrite', 'rewrites')} ({report.source or 'no source file'})", places)
        + details("each of them", [report.details()] if report.details() else [])
    )
    rewritten, nodes, weights, seconds = _numbers(report)
    return [what, rewritten, nodes, f"<small>{html.escape(operators)}</small>", weights, seconds]


def _numbers(report: PassReport) -> tuple[str, str, str, str]:
    return (
        f"{report.rewrites} of {report.matches}",
        f"{report.nodes_before} → {report.nodes_after}",
        _megabytes(report),
        f"{report.seconds:.2f} s",
    )


def _megabytes(report: PassReport) -> str:
    before, after = (f"{size / 1e6:.1f}" for size in (report.weight_bytes_before, report.weight_bytes_after))
    return f"{after} MB" if before == after else f"{before} → {after} MB"


def _count(number: int, one: str, many: str) -> str:
    return "" if not number else f"{number} {one if number == 1 else many}"
