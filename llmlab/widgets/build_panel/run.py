"""A build in a thread of its own: what it is at, since when, and how to stop it."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.build import build
from llmlab.errors import LlmlabError
from llmlab.graph.graph import Graph
from llmlab.progress import Progress, watched
from llmlab.runtime.engine import Engine

_MOST_LINES = 400


@dataclass
class Stage:
    """A part of a build. Times are seconds since its start."""

    name: str
    began: float
    ended: float | None = None
    progress: Progress | None = None
    """How far it is, where that is known."""

    def seconds(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.began


class BuildRun:
    """Builds in a thread. `state` is running, stopping, stopped, failed or done. Read under `lock`."""

    def __init__(self, graph: Graph, folder: Path, options: dict[str, Any], changed: Callable[[], object]) -> None:
        """changed: called from the build's thread when something is new."""
        self.folder = folder
        self.lock = threading.Lock()
        self.state = "running"
        self.stages: list[Stage] = []
        self.log: list[tuple[float, str]] = []
        self.engine: Engine | None = None
        self.problem: BaseException | None = None
        self.seconds = 0.0
        """Of the whole build, once it is over."""
        self._graph, self._options, self._changed = graph, options, changed
        self._stop = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="llmlab-build-panel", daemon=True
        )
        self._thread.start()

    @property
    def now(self) -> float:
        """Seconds since it began; of one that is over, how long it took."""
        return time.monotonic() - self._start if self.running else self.seconds

    @property
    def running(self) -> bool:
        return self.state in ("running", "stopping")

    def stop(self) -> None:
        """End it at the next opportunity; nothing half-written stays."""
        self._stop.set()
        with self.lock:
            if self.state == "running":
                self.state = "stopping"
                self._say("asked to stop")

    def wait(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def bytes_on_disk(self) -> int:
        """What the build has written so far: of its unfinished folder, or of the finished one."""
        if self.engine is not None:
            return self.engine.size
        total = 0
        try:
            for work in self.folder.parent.glob(f".{self.folder.name}.*.partial"):
                total += sum(file.stat().st_size for file in work.iterdir() if file.is_file())
        except OSError:  # it is being moved
            pass
        return total

    def _run(self) -> None:
        state, said = "done", ""
        try:
            with watched(self._watch):
                self.engine = build(self._graph, self.folder, **self._options)
            said = f"built {self.folder.name}: {self.engine.size:,} bytes in {len(self.engine.manifest.files)} files"
        except KeyboardInterrupt as problem:
            self.problem, state, said = problem, "stopped", "stopped: nothing was left behind"
        except LlmlabError as problem:
            self.problem, state, said = problem, "failed", str(problem)
        except BaseException as problem:
            self.problem, state, said = problem, "failed", f"{type(problem).__name__}: {problem}"
        with self.lock:
            self.seconds = time.monotonic() - self._start
            if self.stages and self.stages[-1].ended is None:
                self.stages[-1].ended = self.seconds
            self.state = state
            self._say(said)
        self._changed()

    def _watch(self, told: Progress | str) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        now = time.monotonic() - self._start
        with self.lock:
            if isinstance(told, str):
                if self.stages:
                    self.stages[-1].ended = now
                self.stages.append(Stage(told, now))
                self._say(told)
            elif self.stages:
                before = self.stages[-1].progress
                self.stages[-1].progress = told
                if told.unit != "B" and (before is None or before.done != told.done):
                    self._say(f"{told.done:g} of {told.total:g} {told.unit or told.what}s")
        if isinstance(told, str):
            self._changed()

    def _say(self, text: str) -> None:
        if len(self.log) < _MOST_LINES:
            self.log.append((time.monotonic() - self._start, text))
