"""What the passes did at one place of a graph, and why the others didn't."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_graphsurgeon as gs
from rich.console import Group, RenderableType
from rich.text import Text

from llmlab.errors import InputError, nearest
from llmlab.graph.reports.diff import GraphDiff
from llmlab.graph.reports.render import details, html_table, lines_html, lines_text, plain, tally
from llmlab.graph.reports.report import History, NearMiss, PassReport, Rewrite, folded

_STATUS = {"fired": "bold green", "changed": "green", "near miss": "yellow"}
_SHOWN = 8  # lines of what a pass changed, in a terminal
_SAYS = {"changed": "fired elsewhere, changed this"}


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
        return _text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": _html(self)}


def _text(found: Why) -> RenderableType:
    """Short enough for a terminal: names without the module that all of them share, of each pass the first few lines."""
    shared = _shared_module(found)
    parts: list[RenderableType] = [
        plain(found.place, "bold").append_text(plain(f"  … is {shared}" if shared else "", "dim"))
    ]
    if not found.passes:
        parts.append(Text("no pass has run on this graph"))
    for here in found.with_status(*_STATUS):
        line = plain(here.report.title, "bold").append(f"  {_says(here)}", _STATUS[here.status])
        line.append_text(plain(f"  {here.report.source.rpartition('/')[2]}".rstrip(), "dim"))
        changes = [_without(shared, text) for text in _lines(here)]
        rest = len(changes) - _SHOWN if len(changes) > _SHOWN + 1 else 0
        parts += [line, *lines_text(changes[: len(changes) - rest], "  ")]
        if rest:
            parts.append(plain(f"  … {rest} more lines: --json and notebooks show all", "dim"))
        parts += [plain(f"  {_without(shared, miss)}", "yellow") for miss in folded(here.near_misses)]
    if found.not_found:
        parts.append(plain(f"pattern not found here: {', '.join(found.not_found)}", "dim"))
    return Group(*parts)


def _shared_module(found: Why) -> str:
    """The whole path of the module that `found.place` is the end of, if it is one module's and not that of several."""
    if "/" in found.place:
        return ""
    ends = re.compile(rf"(?<![\w.])((?:[^\s./]+\.)*{re.escape(found.place)})(?=[./])")
    paths = {path for here in found.passes for line in _lines(here) for path in ends.findall(line)}
    return paths.pop() if len(paths) == 1 else ""


def _without(module: str, line: str) -> str:
    return re.sub(rf"(?<![\w.]){re.escape(module)}(?=[./])", "…", line) if module else line


def _html(found: Why) -> str:
    rows = [
        [
            f"<b>{html.escape(here.report.title)}</b><br><small>{html.escape(here.report.source)}</small>",
            html.escape(_says(here)),
            details("what changed" + tally(lines), lines_html(lines))
            + "".join(f"<div><small>{html.escape(miss)}</small></div>" for miss in folded(here.near_misses)),
        ]
        for here in found.with_status(*_STATUS)
        for lines in [_lines(here)]
    ]
    end = f"<div><small>pattern not found here: {html.escape(', '.join(found.not_found))}</small></div>"
    return (
        f"<div><b>{html.escape(found.place)}</b>{'' if found.passes else ': no pass has run on this graph'}</div>"
        + (html_table(("pass", "what it did here", ""), rows) if rows else "")
        + (end if found.not_found else "")
    )


def _lines(here: PassHere) -> list[str]:
    return [line for block in here.diff.blocks() for line in block.texts[1:]]


def _says(here: PassHere) -> str:
    return f"fired {len(here.rewrites)}×" if here.rewrites else _SAYS.get(here.status, here.status)


class HasHistory(Protocol):
    """A `Graph`, or anything else with the surgeon's graph and the reports of its passes in it."""

    surgeon: gs.Graph
    history: History


def why(graph: HasHistory, place: str) -> Why:
    """What each pass did at `place`, from the graph's history; `Graph.why` has the details."""
    here = _at(place)
    known = {node.name for node in graph.surgeon.nodes}
    for report in graph.history:
        known.update(report.diff.added, report.diff.removed, (m.node for m in report.near_misses))
        known.update(p.node for p in report.places)
    if not any(map(here, known)):
        names = known if "/" in place else {m for name in known for m in _modules(name) if m}
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
