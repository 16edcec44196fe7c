"""Layers of one engine or of two as a panel: sorted, searched, folded, measured again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup

from llmlab.errors import InputError, LlmlabError
from llmlab.evaluate.layers.measure import layers
from llmlab.evaluate.layers.model import EngineLayers
from llmlab.runtime.engine import Engine
from llmlab.widgets.engine_view import draw
from llmlab.widgets.engine_view.state import SORTS, EngineViewState
from llmlab.widgets.panel import Panel


class EngineView(EngineViewState, Panel):
    """What `llmlab.inspect(engine)` and `llmlab.inspect(engine, other)` give.

    `measured` has the data: one EngineLayers for each engine. `measure()` measures again.
    """

    name = "engine-view"
    regions: ClassVar[tuple[str, ...]] = ("head", "totals", "rows")

    def __init__(self, engines: list[Engine], measured: list[EngineLayers], options: dict[str, Any]) -> None:
        Panel.__init__(self)
        EngineViewState.__init__(self, engines, measured)
        self.options = options
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None

    def on_phase(self, key: str, value: Any) -> None:
        if value in ("decode", "prefill"):
            self.phase = value

    def on_sort(self, key: str, value: Any) -> list[str]:
        if value in SORTS:
            self.sort = value
        return ["rows"]

    def on_search(self, key: str, value: Any) -> list[str]:
        self.search = str(value or "")[:200]
        return ["rows"]

    def on_block(self, key: str, value: Any) -> list[str]:
        self.block = str(value or "")
        return ["rows"]

    def on_measure(self, key: str, value: Any) -> list[str]:
        if self._worker is None or not self._worker.is_alive():
            self._stop.clear()
            self.status = "measuring"
            self._worker = threading.Thread(target=self._measure, name="llmlab-layers", daemon=True)
            self._worker.start()
        return ["head"]

    def on_stop(self, key: str, value: Any) -> list[str]:
        self._stop.set()
        return ["head"]

    def close(self) -> None:
        self._stop.set()

    def _measure(self) -> None:
        status = ""
        try:
            found = [layers(engine, stop=self._stop, **self.options) for engine in self.engines]
            with self.lock:
                self.measured = found
        except KeyboardInterrupt:
            status = "stopped: these are the times from before"
        except LlmlabError as problem:
            status = str(problem)
        with self.lock:
            self.status = status
        self.refresh()

    def draw_head(self) -> Markup:
        return draw.head(self)

    def draw_totals(self) -> Markup:
        return draw.totals(self)

    def draw_rows(self) -> Markup:
        return draw.rows(self)

    def to_dict(self) -> dict[str, Any]:
        both = self.alignment
        shown = both.to_dict() if both is not None else {"engines": [m.to_dict() for m in self.measured]}
        return {**super().to_dict(), "phase": self.phase, **shown}

    def __str__(self) -> str:
        return "\n".join(map(str, self.measured))


def view_engines(*given: Engine | EngineLayers | str | Path, **options: Any) -> EngineView:
    """The view of one engine or of two; options are those of `llmlab.layers`, and what was measured before isn't measured again."""
    if not 1 <= len(given) <= 2:
        raise InputError(f"{len(given)} engines were given, expected one, or two of one model")
    for what in given:
        if not isinstance(what, (Engine, EngineLayers, str, Path)):
            raise InputError(f"one is a {type(what).__name__}, expected an engine, or what llmlab.layers gave")
    engines = [g if isinstance(g, Engine) else Engine.load(g) for g in given if not isinstance(g, EngineLayers)]
    opened = iter(engines)
    found = [g if isinstance(g, EngineLayers) else layers(next(opened), **options) for g in given]
    return EngineView(engines if len(engines) == len(given) else [], found, options)
