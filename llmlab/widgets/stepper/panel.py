"""The stepper's state, what its controls do, and how it is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from llmlab.errors import InputError, nearest
from llmlab.graph.graph import Graph
from llmlab.graph.reports.quantization import QuantizationReport
from llmlab.graph.reports.report import PassReport
from llmlab.widgets.markup import button, control, copies, h
from llmlab.widgets.panel import Panel
from llmlab.widgets.stepper.draw import changes, misses, numbers, places, sides, source, table
from llmlab.widgets.stepper.places import Place, places_of


class Stepper(Panel):
    """The passes that made a graph, one at a time: where each fired, what went and came there, and what nearly matched."""

    regions = ("bar", "pass", "places", "sides", "changes")
    name = "stepper"

    def __init__(self, graph: Graph, at: int | str = "") -> None:
        super().__init__()
        self.reports: list[PassReport] = list(graph.history)
        self.model = f"{graph.kind} {graph.config.model_type}"
        self.at = self._find(at)
        self.chosen = 0
        self._places: dict[int, list[Place]] = {}

    def title(self) -> str:
        if not self.reports:
            return f"{self.model} graph: no pass has run on it"
        done = sum(report.rewrites > 0 for report in self.reports)
        first, last = self.reports[0], self.reports[-1]
        return f"{self.model} graph: {len(self.reports)} passes, of which {done} rewrote something, {first.nodes_before:,} → {last.nodes_after:,} nodes"

    @property
    def report(self) -> PassReport | None:
        return self.reports[self.at] if self.reports else None

    @property
    def places(self) -> list[Place]:
        """Where the pass fired, alike layers as one."""
        if self.report is not None and self.at not in self._places:
            self._places[self.at] = places_of(self.report)
        return self._places.get(self.at, [])

    @property
    def place(self) -> Place | None:
        found = self.places
        return found[min(self.chosen, len(found) - 1)] if found else None

    def _find(self, at: int | str) -> int:
        """The number of a pass, from 0; the first that rewrote something where none is named."""
        if at == "":
            return next((i for i, report in enumerate(self.reports) if report.rewrites), 0)
        if isinstance(at, int) and not isinstance(at, bool) and 0 <= at < len(self.reports):
            return at
        titles = [report.title for report in self.reports]
        if at not in titles:
            raise InputError(
                f"at is {at!r}, expected a number below {len(titles)} or a pass of the history ({nearest(str(at), titles)})"
            )
        return titles.index(str(at))

    def _go(self, at: int) -> None:
        self.at, self.chosen = max(0, min(at, len(self.reports) - 1)), 0

    # Actions

    def on_step(self, key: str, value: Any) -> Iterable[str]:
        """The slider: a number from 1."""
        self._go(int(value) - 1)
        return ("pass", "places", "sides", "changes")

    def on_previous(self, key: str, value: Any) -> None:
        self._go(self.at - 1)

    def on_next(self, key: str, value: Any) -> None:
        self._go(self.at + 1)

    def on_jump(self, key: str, value: Any) -> None:
        """The next pass, or with `-` the one before, that rewrote something or nearly did."""
        step = -1 if key == "-" else 1
        at = self.at + step
        while 0 <= at < len(self.reports) and not (self.reports[at].rewrites or self.reports[at].near_misses):
            at += step
        if 0 <= at < len(self.reports):
            self._go(at)

    def on_place(self, key: str, value: Any) -> Iterable[str]:
        if not key.isdecimal() or int(key) >= len(self.places):
            raise InputError(f"no place {key!r}: this pass has {len(self.places)}")
        self.chosen = int(key)
        return ("places", "sides", "changes")

    # Drawing

    def draw_bar(self) -> Markup:
        if not self.reports:
            hint = "The graph is as it was exported: llmlab.optimize(graph) runs passes, and gives a graph that has a history."
            return h("div", h("h3", self.title()), h("p", hint))
        last = len(self.reports)
        bar = h(
            "input",
            type="range",
            min=1,
            max=last,
            value=self.at + 1,
            aria_valuetext=self.reports[self.at].title,
            **control("step"),
        )
        controls = [
            button("◂ previous", "previous", disabled=self.at == 0),
            button("next ▸", "next", disabled=self.at == last - 1),
            button("◂◂ one that did something", "jump", "-"),
            button("one that did something ▸▸", "jump", "+"),
            h("label", "pass ", bar, class_="live-only"),
        ]
        every = table(self.reports) if self.is_static else None
        return h("div", h("h3", self.title()), h("div", controls, class_="bar", data_walk="row"), every)

    def draw_pass(self) -> Markup:
        report = self.report
        if report is None:
            return Markup("")
        where, text = source(report)
        return h(
            "div",
            h("h4", f"{self.at + 1} of {len(self.reports)}: {report.title}"),
            h("p", report.summary) if report.summary else None,
            numbers(report),
            h("p", h("code", where), " ", copies("copy", where, "copy the file and line")) if where else None,
            text,
            h("details", h("summary", "each projection"), Markup(report.details()), data_keep="each", class_="wide")
            if isinstance(report, QuantizationReport)
            else None,
        )

    def draw_places(self) -> Markup:
        if self.report is None:
            return Markup("")
        return h("div", places(self.places, self.chosen), misses(self.report.near_misses), class_="columns")

    def draw_sides(self) -> Markup:
        return Markup("") if self.report is None or self.place is None else sides(self.report, self.place)

    def draw_changes(self) -> Markup:
        return Markup("") if self.report is None else changes(self.report, self.place)

    def to_dict(self) -> dict[str, Any]:
        shown = {"at": self.at, "place": self.place.nodes[0] if self.place is not None else ""}
        return {**super().to_dict(), **shown, "passes": [report.to_dict() for report in self.reports]}

    def __str__(self) -> str:
        done = [report for report in self.reports if report.rewrites or report.near_misses]
        return "\n".join([self.title(), *(f"  {r.title}: {r.rewrites} of {r.matches} rewritten" for r in done)])


def steps(graph: Graph, at: int | str = "") -> Stepper:
    """A panel that goes through the passes that made `graph`, from its history, also once it was saved and loaded.

    at: the pass to begin with, by name (`fuse_rope`, `simplify #2`) or number from 0. Raises InputError.
    """
    if not isinstance(graph, Graph):
        raise InputError(f"steps got a {type(graph).__name__}, expected a Graph: open a folder with llmlab.Graph.load")
    return Stepper(graph, at)
