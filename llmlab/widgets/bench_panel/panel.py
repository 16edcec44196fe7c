"""`llmlab.bench`: how fast an engine is, measured in a thread while its panel shows what is known."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup

from llmlab.errors import InputError, LlmlabError
from llmlab.evaluate.latencies import Latencies, measure_latencies, points
from llmlab.evaluate.roofline import measure_roofline
from llmlab.machine import physical_cores
from llmlab.runtime.engine import Engine
from llmlab.widgets.bench_panel import draw
from llmlab.widgets.bench_panel.draw_roofline import roofline
from llmlab.widgets.bench_panel.state import BenchState
from llmlab.widgets.panel import Panel


class BenchPanel(BenchState, Panel):
    """Measures in a thread of its own. `result()` waits and gives the numbers; `stop()` ends it, and what is known stays."""

    name = "bench-panel"
    regions: ClassVar[tuple[str, ...]] = ("state", "numbers", "roofline")

    def __init__(
        self, engine: Engine, batches: tuple[int, ...], prompt: int, output: int, repeat: int, threads: int | None
    ):
        Panel.__init__(self)
        BenchState.__init__(self, engine, batches, prompt, output, repeat, threads)
        self._problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmlab-bench", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Any]:
        """The numbers, once all are there. Ctrl-C stops the measuring. Raises what it raised."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.2)
        except KeyboardInterrupt:
            self.stop()
            raise
        if self._problem is not None:
            raise self._problem
        return self.to_dict()

    def stop(self) -> None:
        """End it between two steps, and wait for that."""
        self._stop.set()
        self._thread.join()

    def close(self) -> None:
        self._stop.set()

    def on_stop(self, key: str, value: Any) -> list[str]:
        self._stop.set()
        return ["state"]

    def on_again(self, key: str, value: Any) -> None:
        if not self._thread.is_alive():
            self._stop.clear()
            self.state, self.rows, self.points, self._problem = "running", [], [], None
            self._thread = threading.Thread(target=self._run, name="llmlab-bench", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        state = "done"
        try:
            self._say(f"{len(self.batches)} batch sizes, {self.repeat} runs each")
            measure_latencies(
                self.engine,
                self.batches,
                prompt=self.prompt,
                output=self.output,
                repeat=self.repeat,
                threads=self.threads,
                stop=self._stop,
                done=self._row,
            )
            self._place()
        except KeyboardInterrupt as problem:
            state, self._problem = "stopped", problem
        except Exception as problem:
            state, self._problem = "failed", problem
        with self.lock:
            self.state = state
            self.doing = "" if state != "failed" else _said(self._problem)
        self.refresh()

    def _place(self) -> None:
        """Its steps on the machine's roofline."""
        if self.engine.manifest.target != "onnxruntime":
            self.note = "no roofline: this processor's ceilings say nothing about an engine that runs on a GPU"
            return
        self._say("what this machine reaches")
        threads = self.threads or physical_cores()
        ceiling = measure_roofline(threads, self._stop)
        with self.lock:
            self.roofline = ceiling
        self._say("the engine's steps, layer by layer")
        try:
            found = points(self.engine, self.batches, self.prompt, self.threads, self._stop)
        except LlmlabError as problem:
            self.note = str(problem)
            return
        with self.lock:
            self.points = found

    def _row(self, row: Latencies) -> None:
        with self.lock:
            self.rows.append(row)
        self.refresh("numbers")

    def _say(self, doing: str) -> None:
        with self.lock:
            self.doing = doing
        self.refresh("state", "roofline")

    def draw_state(self) -> Markup:
        return draw.state(self)

    def draw_numbers(self) -> Markup:
        return draw.numbers(self)

    def draw_roofline(self) -> Markup:
        return roofline(self)

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "state": self.state,
            "batches": [row.to_dict() for row in self.rows],
            "roofline": None if self.roofline is None else self.roofline.to_dict(),
            "points": [point.to_dict() for point in self.points],
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.title()}: {self.state}", *("  " + ", ".join(draw.facts(row)) for row in self.rows)])


def bench(
    engine: Engine | str | Path,
    batches: Sequence[int] = (1, 4),
    *,
    prompt: int = 64,
    output: int = 32,
    repeat: int = 3,
    threads: int | None = None,
) -> BenchPanel:
    """How fast an engine is on random tokens: time to the first token, between tokens, throughput, and where its steps lie on the roofline
    of this machine. Measured in a thread of its own; `.result()` waits.

    batches: how many sequences run together. prompt, output: tokens of each. repeat: runs that count. threads: of an ONNX Runtime engine.
    Raises InputError for numbers that don't fit the engine.
    """
    opened = engine if isinstance(engine, Engine) else Engine.load(engine)
    most = opened.manifest.max_num_seqs
    sizes = tuple(batches)
    for name, given, limit in (
        *(("a batch size", size, most) for size in sizes),
        ("prompt", prompt, opened.manifest.max_seq_len - 1),
        ("output", output, opened.manifest.max_seq_len - 1),
        ("repeat", repeat, 1000),
    ):
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= limit:
            raise InputError(f"{name} is {given!r}, expected an integer from 1 to {limit}")
    if not sizes:
        raise InputError("batches is empty, expected batch sizes such as (1, 4)")
    if prompt + output > opened.manifest.max_seq_len:
        raise InputError(
            f"prompt and output are {prompt} + {output} tokens, this engine holds {opened.manifest.max_seq_len}: give smaller ones"
        )
    return BenchPanel(opened, sizes, prompt, output, repeat, threads)


def _said(problem: BaseException | None) -> str:
    return str(problem) if isinstance(problem, LlmlabError) else f"{type(problem).__name__}: {problem}"
