"""`llmlab.watch_build`: an engine is built while its panel says how far it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup

from llmlab.errors import EngineError, InputError
from llmlab.graph.graph import Graph
from llmlab.runtime.engine import Engine
from llmlab.widgets.build_panel.run import BuildRun, Stage
from llmlab.widgets.markup import button, copies, h
from llmlab.widgets.panel import Panel

_TICK = 0.4  # seconds between two looks
_WORDS = {
    "running": "building",
    "stopping": "stopping at the next opportunity",
    "stopped": "stopped, nothing was left behind",
    "failed": "failed",
    "done": "done",
}


class BuildPanel(Panel):
    """A build that runs in a thread of its own. `result()` waits for it and gives the Engine; `stop()` ends it."""

    name = "build-panel"
    regions: ClassVar[tuple[str, ...]] = ("state", "stages", "log", "files")

    def __init__(self, graph: Graph, folder: Path, options: dict[str, Any]) -> None:
        super().__init__()
        self.target = str(options.get("target", "onnxruntime"))
        self.run = BuildRun(graph, folder, options, self.refresh)
        threading.Thread(target=self._tick, name="llmlab-build-clock", daemon=True).start()

    def title(self) -> str:
        return f"Building {self.run.folder.name} for {self.target}"

    def result(self) -> Engine:
        """The engine, once it is built. Ctrl-C stops the build. Raises what the build raised: LlmlabError, or KeyboardInterrupt where it
        was stopped."""
        try:
            while self.run.running:
                self.run.wait(0.2)
        except KeyboardInterrupt:
            self.run.stop()
            self.run.wait()
            raise
        if self.run.engine is None:
            raise self.run.problem or EngineError(f"{self.run.folder}: was not built")
        return self.run.engine

    def stop(self) -> None:
        """End the build at the next opportunity, and wait for that."""
        self.run.stop()
        self.run.wait()

    def close(self) -> None:
        self.run.stop()

    def on_stop(self, key: str, value: Any) -> list[str]:
        self.run.stop()
        return ["state", "log"]

    def draw_state(self) -> Markup:
        run = self.run
        written = f", {run.bytes_on_disk():,} bytes on disk"
        line = h("p", h("b", _WORDS[run.state]), f": {_clock(run.now)}{written}", role="status")
        stop = h("div", button("Stop", "stop", disabled=run.state == "stopping"), class_="bar live-only")
        return h("div", h("h3", self.title()), line, stop if run.running else None)

    def draw_stages(self) -> Markup:
        with self.run.lock:
            stages, now = list(self.run.stages), self.run.now
        longest = max((stage.seconds(now) for stage in stages), default=1.0) or 1.0
        rows = [self._stage(stage, now, longest) for stage in stages]
        heads = (("stage", None), ("took", "number"), ("", None), ("so far", None))
        head = h("tr", [h("th", text, scope="col", class_=look) for text, look in heads])
        return h("table", h("thead", head), h("tbody", rows), class_="bp-stages") if rows else h("p", "beginning")

    @staticmethod
    def _stage(stage: Stage, now: float, longest: float) -> Markup:
        seconds = stage.seconds(now)
        bar = h("span", class_="bp-bar", style=f"width:{max(1.0, 200 * seconds / longest):.0f}px")
        word = "" if stage.ended is not None else " (running)"
        return h(
            "tr",
            h("td", stage.name + word),
            h("td", _clock(seconds), class_="number"),
            h("td", bar),
            h("td", _how_far(stage)),
        )

    def draw_log(self) -> Markup:
        with self.run.lock:
            lines = list(self.run.log)
        rows = [h("div", h("span", f"{at:8.1f} s  ", class_="soft"), text) for at, text in lines]
        inside = h("div", rows, class_="scroll mono bp-log", data_scroll="log", data_follow="yes")
        return h("details", h("summary", "what happened"), inside, data_keep="log")

    def draw_files(self) -> Markup:
        engine = self.run.engine
        if engine is None:
            return h("p", str(self.run.problem), class_="removed") if self.run.state == "failed" else Markup("")
        files = sorted(engine.manifest.files.items(), key=lambda item: -int(item[1]["size"]))
        rows = [h("tr", h("td", h("code", n)), h("td", f"{int(e['size']):,}", class_="number")) for n, e in files[:40]]
        more = h("p", f"and {len(files) - 40} more") if len(files) > 40 else None
        path = str(engine.path)
        return h(
            "div",
            h("h4", f"{engine.size:,} bytes in {len(files)} files"),
            h("table", h("tr", h("th", "file", scope="col"), h("th", "bytes", scope="col", class_="number")), rows),
            more,
            h(
                "div",
                h("span", "see what the compiler made of it: ", h("code", f"ll.inspect({path!r})")),
                copies("copy that line", f"ll.inspect({path!r})"),
                class_="bar",
            ),
        )

    def _tick(self) -> None:
        while self.run.running:
            self.run.wait(_TICK)
            self.refresh("state", "stages", "log")

    def to_dict(self) -> dict[str, Any]:
        with self.run.lock:
            stages = [{"name": s.name, "seconds": s.seconds(self.run.now)} for s in self.run.stages]
            log = [{"seconds": at, "text": text} for at, text in self.run.log]
        return {
            **super().to_dict(),
            "state": self.run.state,
            "seconds": self.run.now,
            "bytes": self.run.bytes_on_disk(),
            "stages": stages,
            "log": log,
            "engine": None if self.run.engine is None else str(self.run.engine.path),
        }

    def __str__(self) -> str:
        lines = [f"  {s.name}: {_clock(s.seconds(self.run.now))}" for s in self.run.stages]
        return "\n".join([f"{self.title()}: {_WORDS[self.run.state]}, {_clock(self.run.now)}", *lines])


def watch_build(graph: Graph, folder: str | Path, **options: Any) -> BuildPanel:
    """Build an engine in a thread of its own and watch it: stages with the time that each took, bytes on disk, a button that stops.

    options: those of `llmlab.build`. Nothing is estimated: times are measured, and how far a stage is is shown where it is known.
    `.result()` waits and gives the Engine. Stopped or failed, it leaves nothing behind. Raises InputError for what is no graph.
    """
    if not isinstance(graph, Graph):
        raise InputError(
            f"watch_build got a {type(graph).__name__}, expected a Graph: pass what llmlab.optimize returned"
        )
    return BuildPanel(graph, Path(folder), options)


def _how_far(stage: Stage) -> str:
    told = stage.progress
    if told is None:
        return ""
    if told.unit == "B":
        return f"{told.done / 1e6:,.1f} of {told.total / 1e6:,.1f} MB"
    of = f" of {told.total:g}" if told.total else ""
    unit = f" {told.unit}s" if told.unit else ""
    return f"{told.done:g}{of}{unit}" + (f": {told.what}" if told.what and stage.ended is None else "")


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
