"""What the passes did at one place of a graph, and why the others didn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmlab.errors import InputError, nearest
from llmlab.graph.reports.diff import GraphDiff
from llmlab.graph.reports.report import NearMiss, PassReport, Rewrite

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmlab.graph.graph import Graph


@dataclass(frozen=True)
class PassHere:
    """What one run of a pass has to do with the place."""

    report: PassReport = field(repr=False)
    rewrites: tuple[Rewrite, ...]
    """Those anchored at a node here."""
    near_misses: tuple[NearMiss, ...]
    diff: GraphDiff
    """What the run changed here, whatever rewrite did it."""

    @property
    def status(self) -> str:
        """`fired`; `changed` where a rewrite elsewhere changed nodes here; `near miss`; or `not found`."""
        if self.rewrites:
            return "fired"
        return "changed" if self.diff else "near miss" if self.near_misses else "not found"

    def to_dict(self) -> dict[str, Any]:
        return {
            "pass": self.report.name,
            "run": self.report.run,
            "status": self.status,
            "source": self.report.source,
            "rewrites": [r.node for r in self.rewrites],
            "near_misses": [{"node": m.node, "reason": m.reason} for m in self.near_misses],
            "diff": self.diff.to_dict(),
        }


@dataclass(frozen=True)
class Why:
    """What `graph.why(place)` found: every run of a pass, in order, with what it did at `place` and what held it back."""

    place: str
    passes: tuple[PassHere, ...]

    def with_status(self, *wanted: str) -> list[PassHere]:
        """The runs whose `status` is one of `wanted`."""
        return [here for here in self.passes if here.status in wanted]

    @property
    def not_found(self) -> list[str]:
        """Names of the passes whose pattern was found here in none of their runs."""
        seen = {here.report.name for here in self.with_status("fired", "changed", "near miss")}
        return list(dict.fromkeys(here.report.name for here in self.passes if here.report.name not in seen))

    def to_dict(self) -> dict[str, Any]:
        return {"place": self.place, "passes": [here.to_dict() for here in self.passes]}

    def __str__(self) -> str:
        lines = [self.place if self.passes else f"{self.place}: no pass has run on this graph"]
        for here in self.with_status("fired", "changed", "near miss"):
            lines.append(f"  {here.report.title}: {here.status}" + (f", {here.diff}" if here.diff else ""))
            lines += [f"    not {m.node}: {m.reason}" for m in here.near_misses]
        if self.not_found:
            lines.append(f"  pattern not found: {', '.join(self.not_found)}")
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        from llmlab.graph.reports.render import why_text

        return why_text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from llmlab.graph.reports.render import why_html

        return {"text/plain": str(self), "text/html": why_html(self)}


def why(graph: Graph, place: str) -> Why:
    """What each pass did at `place`, from the graph's history; `Graph.why` has the details."""
    here = _at(place)
    known = {node.name for node in graph.surgeon.nodes}
    for report in graph.history:
        known.update(report.diff.added, report.diff.removed, (m.node for m in report.near_misses))
        known.update(p.node for p in report.places)
    if not any(map(here, known)):
        names = known if "/" in place else {m for name in known for m in _modules(name)}
        raise InputError(f"{place!r} is no module or node of this graph, now or earlier ({nearest(place, names)})")
    return Why(place, tuple(_pass_here(report, here) for report in graph.history))


def _pass_here(report: PassReport, here: Callable[[str], bool]) -> PassHere:
    return PassHere(
        report,
        tuple(p for p in report.places if here(p.node)),
        tuple(m for m in report.near_misses if here(m.node)),
        report.diff.at(here),
    )


def _at(place: str) -> Callable[[str], bool]:
    """Whether a node of the given name lies at `place`."""
    if not isinstance(place, str) or not place.strip("./ "):
        raise InputError(f"place is {place!r}, expected a part of a module's path such as 'layers.0.self_attn'")
    if "/" in place:
        return lambda name: f".{name}".endswith(f".{place}")
    return lambda name: f".{place}." in f".{name.partition('/')[0]}."


def _modules(node_name: str) -> list[str]:
    """The module that a node belongs to, and those around it."""
    parts = node_name.partition("/")[0].split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
