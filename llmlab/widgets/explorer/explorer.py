"""`llmlab.explore`: the panel in which precisions are chosen part by part, and built."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmlab.build import build
from llmlab.errors import InputError, LlmlabError
from llmlab.evaluate.comparison import Comparison
from llmlab.evaluate.pareto import svg
from llmlab.evaluate.sensitivity import Sensitivity
from llmlab.graph.graph import Graph
from llmlab.quant.quantize import quantize
from llmlab.quant.recipe import Recipe
from llmlab.runtime.engine import Engine
from llmlab.widgets.explorer.draw import front_picture, heat_table, measured_table, megabytes
from llmlab.widgets.explorer.mix import WIDE, Mix
from llmlab.widgets.markup import button, control, copies, h, select, slider
from llmlab.widgets.panel import Panel

_STEPS = 200
"""Places of the budget's slider."""


def explore(
    graph: Graph,
    sensitivities: Sensitivity | Sequence[Sensitivity],
    comparison: Comparison | None = None,
    *,
    calibration: Any = None,
) -> PrecisionExplorer:
    """The precision explorer: a budget in bytes chooses a precision for each part, a click keeps one as you want it, and what the whole is
    expected to cost moves along. "Build this" makes the engine.

    graph: the serving graph that the sensitivities are of. sensitivities: what `llmlab.sensitivity` measured, one for each recipe to
    choose from, all by product (as `llmlab.search` does) or all by projection. comparison: engines of `llmlab.compare`, for the figure
    of accuracy, speed and size. calibration: for recipes that need one.
    Raises InputError for sensitivities that don't go together.
    """
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    found = [sensitivities] if isinstance(sensitivities, Sensitivity) else list(sensitivities)
    return PrecisionExplorer(graph, Mix(found), comparison, calibration)


class PrecisionExplorer(Panel):
    """A mix of precisions under a budget, what it is expected to be like, and the engine that was built of it."""

    regions = ("summary", "budget", "front", "map", "measured", "build")
    name = "explorer"

    def __init__(self, graph: Graph, mix: Mix, comparison: Comparison | None, calibration: Any) -> None:
        super().__init__()
        self.graph, self.mix, self.comparison = graph, mix, comparison
        self.budget = (mix.wide_bytes + mix.smallest) // 2
        self.within = mix.fit(self.budget)
        self.shown = mix.recipes[-1]
        self.brush = WIDE
        self.engine: Engine | None = None
        """The engine that was built last."""
        self._calibration = calibration
        self._worker: threading.Thread | None = None
        self._status = ""

    def title(self) -> str:
        return f"precision explorer: KL {self.mix.kl:.2g}, {megabytes(self.mix.size)} expected"

    @property
    def recipe(self) -> Recipe:
        """The choice, for `llmlab.quantize`."""
        return self.mix.recipe()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"budget_bytes": self.budget, **self.mix.to_dict()}

    # What the page does.

    def on_budget(self, key: str, value: Any) -> tuple[str, ...]:
        """Choose anew for a budget; value: a place of the slider, 0 to 200."""
        share = min(max(float(value), 0.0), _STEPS) / _STEPS
        self.budget = round(self.mix.smallest + share * (self.mix.wide_bytes - self.mix.smallest))
        self.within = self.mix.fit(self.budget)
        return ("summary", "budget", "front", "map", "measured")

    def on_put(self, key: str, value: Any) -> tuple[str, ...]:
        """Keep a part as the brush says; again, to let the budget choose."""
        part = int(key)
        if part in self.mix.by_hand and self.mix.chosen(part) == self.brush:
            self.mix.release(part)
            self.within = self.mix.fit(self.budget)
        else:
            self.mix.put(part, self.brush)
            self.within = self.mix.size <= self.budget
        return ("summary", "budget", "front", "map")

    def on_refit(self, key: str, value: Any) -> tuple[str, ...]:
        """Let the budget choose for all parts that weren't put by hand."""
        self.within = self.mix.fit(self.budget)
        return ("summary", "front", "map")

    def on_release(self, key: str, value: Any) -> tuple[str, ...]:
        for part in tuple(self.mix.by_hand):
            self.mix.release(part)
        return self.on_refit(key, value)

    def on_show(self, key: str, value: Any) -> tuple[str, ...]:
        self.shown = value if value in self.mix.recipes else self.shown
        return ("map",)

    def on_brush(self, key: str, value: Any) -> tuple[str, ...]:
        self.brush = value if value in self.mix.names else self.brush
        return ("map",)

    def on_build(self, key: str, value: Any) -> tuple[str, ...]:
        """Build the choice in a thread; value: {"folder": where to}."""
        if self._worker is not None and self._worker.is_alive():
            raise InputError("an engine is being built: wait until it is there")
        folder = str((value or {}).get("folder", "")).strip()
        if not folder:
            raise InputError("the folder is empty: say where the engine shall be written, such as engines/explored")
        recipe, expected = self.recipe, self.mix.size
        self._status = "quantizing and building …"
        self._worker = threading.Thread(target=self._build, args=(recipe, Path(folder), expected), daemon=True)
        self._worker.start()
        return ("build",)

    def wait(self) -> Engine:
        """Wait for what is being built. Raises InputError if nothing was, or it failed."""
        if self._worker is not None:
            self._worker.join()
        if self.engine is None:
            raise InputError(self._status or "nothing was built yet: press Build this")
        return self.engine

    def close(self) -> None:
        if self._worker is not None:
            self._worker.join()

    def _build(self, recipe: Recipe, folder: Path, expected: int) -> None:
        since, engine = time.perf_counter(), None
        try:
            engine = build(quantize(self.graph, recipe, self._calibration), folder)
            took = time.perf_counter() - since
            status = f"built {engine.path} in {took:.1f} s: {megabytes(engine.size)}, expected {megabytes(expected)}"
        except LlmlabError as error:
            status = str(error)
        except Exception as error:  # a bug of ours is told in the panel too: the thread has no other reader
            status = f"the build failed: {type(error).__name__}: {error}"
        with self.lock:
            self.engine, self._status = engine, status
        self.refresh("build")

    # How it looks.

    def draw_summary(self) -> Markup:
        counts = {name: sum(self.mix.chosen(i) == name for i in range(len(self.mix.parts))) for name in self.mix.names}
        said = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        over = "" if self.mix.size <= self.budget else h("span", "over the budget", class_="badge over")
        numbers = h("b", f"KL {self.mix.kl:.3g}"), " nats a token and ", h("b", megabytes(self.mix.size)), " expected"
        return h(
            "div",
            h("h3", "Precision explorer"),
            h(
                "p",
                numbers,
                " ",
                over,
                h("br"),
                h("small", f"{len(self.mix.parts)} parts: {said}; wide is {megabytes(self.mix.wide_bytes)}"),
            ),
        )

    def draw_budget(self) -> Markup:
        span = (self.mix.wide_bytes - self.mix.smallest) or 1
        place = round(_STEPS * (self.budget - self.mix.smallest) / span)
        by_hand = len(self.mix.by_hand)
        return h(
            "div",
            slider("budget", "budget", 0, _STEPS, min(max(place, 0), _STEPS), text=megabytes(self.budget)),
            button("choose within the budget", "refit", disabled=self.within and self.mix.size <= self.budget),
            button(f"forget {by_hand} by hand", "release", disabled=not by_hand),
            class_="bar",
        )

    def draw_front(self) -> Markup:
        return h(
            "div",
            front_picture(self.mix, self.budget),
            h("small", "Expected: what parts cost alone, added up. Build to know."),
        )

    def draw_map(self) -> Markup:
        choices = [(name, name) for name in self.mix.names]
        bar = h(
            "div",
            select("a click makes a part", "brush", choices, self.brush),
            select("colours: KL with", "show", choices[1:], self.shown),
            class_="bar",
        )
        about = f"Each part: its precision, and below it the KL that {self.shown} alone costs there. A stronger colour costs more."
        return h("div", h("h4", "Layers × projections"), bar, heat_table(self.mix, self.shown), h("small", about))

    def draw_measured(self) -> Markup:
        if self.comparison is None:
            return Markup("")
        figure = Markup(svg(self.comparison.points))  # which escapes what it is given
        return h(
            "div",
            h("h4", "Measured engines: accuracy, speed and size"),
            h(
                "div",
                figure,
                h("div", measured_table(self.comparison.points, self.budget), class_="wide"),
                class_="columns",
            ),
        )

    def draw_build(self) -> Markup:
        running = self._worker is not None and self._worker.is_alive() and self._status.endswith("…")
        folder = h("input", name="folder", value="engines/explored", data_draft="folder", size=28)
        form = h(
            "form",
            h("label", "engine folder ", folder),
            h("button", "Build this", type="submit", class_="main", disabled=running),
            class_="bar live-only",
            **control("build"),
        )
        try:
            text = copies("copy the recipe", self.recipe.to_yaml(), "as YAML, for llmlab quantize")
        except InputError:
            text = Markup("")
        return h("div", h("div", form, text, class_="bar"), h("p", self._status, role="status"))
