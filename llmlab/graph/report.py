"""What a pass did to a graph: its report, and the list of them that a graph carries."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

from llmlab.graph.diff import GraphDiff

_LEFT = "style='text-align:left'"


@dataclass(frozen=True)
class NearMiss:
    """A place where the pattern was found but the rewrite did not apply, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph."""

    name: str
    summary: str
    matches: int
    rewrites: int
    near_misses: tuple[NearMiss, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    diff: GraphDiff = field(default_factory=GraphDiff, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.summary,
            "matches": self.matches,
            "rewrites": self.rewrites,
            "near_misses": [{"node": m.node, "reason": m.reason} for m in self.near_misses],
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "seconds": self.seconds,
            "diff": self.diff.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PassReport:
        return cls(
            **{k: v for k, v in data.items() if k not in ("near_misses", "diff")},
            near_misses=tuple(NearMiss(m["node"], m["reason"]) for m in data["near_misses"]),
            diff=GraphDiff.from_dict(data["diff"]),
        )

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.rewrites} of {self.matches} rewritten, {self.nodes_before} → {self.nodes_after} nodes"
        )
        return text + "".join(f"\n  not {m.node}: {m.reason}" for m in self.near_misses)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return History([self])._repr_mimebundle_()


class History(list[PassReport]):
    """The reports of the passes that made a graph, in order."""

    def __str__(self) -> str:
        return "\n".join(str(report) for report in self) or "no pass has run"

    __repr__ = __str__

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = "".join(_report_row(report) for report in self)
        head = "".join(
            f"<th {_LEFT}>{name}</th>"
            for name in ("pass", "rewritten", "nodes", "operators that came and went", "time")
        )
        return {"text/plain": str(self), "text/html": f"<table><tr>{head}</tr>{rows}</table>"}


def _report_row(report: PassReport) -> str:
    operators = ", ".join(f"{op} {change:+d}" for op, change in report.diff.ops.items())
    misses = "".join(
        f"<br><small>not {html.escape(miss.node)}: {html.escape(miss.reason)}</small>" for miss in report.near_misses
    )
    return (
        f"<tr><td {_LEFT}><b>{html.escape(report.name)}</b><br><small>{html.escape(report.summary)}</small>{misses}</td>"
        f"<td {_LEFT}>{report.rewrites} of {report.matches}</td>"
        f"<td {_LEFT}>{report.nodes_before} → {report.nodes_after}</td>"
        f"<td {_LEFT}><small>{html.escape(operators)}</small></td><td {_LEFT}>{report.seconds:.2f} s</td></tr>"
    )
