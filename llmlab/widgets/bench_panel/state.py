"""What the bench panel measures, and what is known so far."""

from __future__ import annotations

from llmlab.evaluate.latencies import Latencies
from llmlab.evaluate.roofline import Point, Roofline
from llmlab.runtime.engine import Engine


class BenchState:
    """The numbers of one engine, and how far the measuring is."""

    def __init__(
        self, engine: Engine, batches: tuple[int, ...], prompt: int, output: int, repeat: int, threads: int | None
    ):
        self.engine, self.batches, self.prompt, self.output, self.repeat = engine, batches, prompt, output, repeat
        self.threads = threads
        self.state = "running"
        """running, stopped, failed or done."""
        self.doing = ""
        self.rows: list[Latencies] = []
        self.roofline: Roofline | None = None
        self.points: list[Point] = []
        self.note = ""

    def title(self) -> str:
        return f"How fast {self.engine.path.name} is ({self.engine.manifest.target})"
