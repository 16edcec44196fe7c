"""`llmlab.monitor`: in-flight batching, one scheduler step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from llmlab.errors import InputError
from llmlab.runtime.params import checked_integer
from llmlab.runtime.trace import StepRecord, Trace
from llmlab.widgets.monitor import draw
from llmlab.widgets.monitor.player import Player
from llmlab.widgets.monitor.run import Run
from llmlab.widgets.monitor.sources import source_of
from llmlab.widgets.monitor.timeline import timeline
from llmlab.widgets.monitor.traffic import Knobs, Prompt, Traffic, each_prompt
from llmlab.widgets.panel import Panel

if TYPE_CHECKING:
    from llmlab.graph.graph import Graph
    from llmlab.runtime.core import EngineCore
    from llmlab.runtime.llm import LoadedEngine

MOST_STEPS = 10_000
"""Steps that `run` does before it gives up."""
_CHANGING = ("status", "timeline", "blocks", "requests")


def monitor(
    what: Graph | LoadedEngine | Trace | str | Path,
    prompts: Sequence[Prompt] = (),
    *,
    max_tokens: int = 16,
    max_num_seqs: int = 4,
    max_tokens_per_step: int = 16,
    kv_blocks: int | None = None,
    block_size: int | None = None,
    prefix_cache: bool = False,
    batching: Literal["inflight", "static"] = "inflight",
    threads: int | None = None,
) -> Monitor:
    """A panel that shows what the scheduler does with requests and with the KV pool, and lets one step through it.

    what: a serving graph, which the NumPy reference computes over a paged pool of small blocks; an Engine or the path of
        one, as it runs (on ONNX Runtime a block is a slot, as long as the longest sequence); or a Trace, to be replayed
    prompts: texts or lists of token ids that are submitted before the first step; max_tokens is for each of them
    max_num_seqs, max_tokens_per_step, prefix_cache, batching: see `llmlab.LLM`; all can be changed in the panel
    kv_blocks: size of the KV pool; None: 24 blocks for a graph, 4 slots or 64 blocks for an engine
    block_size: tokens that a block of a graph's pool holds; None: 4

    Scheduler, block manager and sampler are those of `llmlab.LLM`. Raises InputError, EngineError.
    """
    if isinstance(what, Trace):
        if prompts:
            raise InputError("a trace has its requests already: give a graph or an engine to submit prompts to")
        return Monitor(what)
    source = source_of(what, num_blocks=kv_blocks, block_size=block_size, threads=threads)
    try:
        knobs = Knobs(max_num_seqs, max_tokens_per_step, source.num_blocks, prefix_cache, batching)
        panel = Monitor(Traffic(source, knobs))
        if len(prompts):
            panel.submit(prompts, max_tokens=max_tokens)
    except BaseException:
        source.close()
        raise
    return panel


class Monitor(Panel):
    """The panel; `step`, `run`, `submit` and the others do from Python what its controls do."""

    name = "monitor"
    regions = ("controls", "knobs", "status", "timeline", "blocks", "submit", "requests")

    def __init__(self, what: Traffic | Trace) -> None:
        super().__init__()
        self._run = Run(what)
        self._player = Player(self.lock, step=self._step, done=self._done)
        self.looked: int | None = None
        """Index of the step that is looked at; None: the last one."""
        self._note = ""

    # What the page shows.

    @property
    def trace(self) -> Trace:
        """All steps; of a replay also those to come."""
        return self._run.trace

    @property
    def steps(self) -> list[StepRecord]:
        """The steps done so far."""
        return self._run.steps

    @property
    def playing(self) -> bool:
        """Whether it steps by itself."""
        return self._player.playing

    @property
    def core(self) -> EngineCore:
        """The engine core that runs. InputError where a trace is replayed."""
        return self._run.live().core

    def title(self) -> str:
        return f"Batching monitor: {self._run.title}"

    def draw_controls(self) -> Markup:
        return draw.controls(self.playing, self._player.speed, self._run.traffic is None)

    def draw_knobs(self) -> Markup:
        return draw.knobs(None if self._run.traffic is None else self._run.traffic.knobs, self.trace)

    def draw_status(self) -> Markup:
        return draw.status(*self._run.view(self.looked), self._note)

    def draw_timeline(self) -> Markup:
        trace, steps, looked = self._run.view(self.looked)
        prompts = {} if self._run.traffic is None else {s.name: s.prompt for s in self._run.traffic.submissions}
        return timeline(trace, steps, looked, prompts) if steps else Markup("")

    def draw_blocks(self) -> Markup:
        trace, steps, looked = self._run.view(self.looked)
        return draw.block_map(trace, steps[looked] if steps else None)

    def draw_submit(self) -> Markup:
        return Markup("") if self._run.traffic is None else draw.submit("")

    def draw_requests(self) -> Markup:
        steps = self._run.view(self.looked)[1]
        return draw.requests(self._run.traffic, steps[-1].sequences if steps else ())

    def draw_problem(self) -> str:
        return self._draw_problem()

    def to_dict(self) -> dict[str, Any]:
        """All steps as plain data, and the requests with their answers."""
        with self.lock:
            shown = {"panel": self.name, "title": self.title(), "trace": self.trace.to_dict()}
            return shown if self._run.traffic is None else shown | self._run.traffic.to_dict()

    def __str__(self) -> str:
        integrity = self.steps[-1].integrity if self.steps else ""
        return f"{self.title()}: {self.trace}" + (f"; books don't balance: {integrity}" if integrity else "")

    # What can be done from Python.

    def submit(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 16,
        ignore_eos: bool = False,
        at: int | None = None,
    ) -> list[str]:
        """Queue one prompt or several before the next step, or before step `at` (from 0); returns their names."""
        with self.lock:
            names = self._run.live().submit(each_prompt(prompts), max_tokens=max_tokens, ignore_eos=ignore_eos, at=at)
            self._note = ""
        self.refresh("status", "requests")
        return names

    def cancel(self, name: str) -> None:
        """End a request before the next step."""
        self._run.live().cancel(name)
        self.refresh("requests")

    def step(self, count: int = 1) -> StepRecord | None:
        """Do `count` steps, each exactly one of the core, and wait for them; the last one, None if there was nothing to do."""
        record = None
        for _ in range(checked_integer("count", count, low=1)):
            if (record := self._step()) is None:
                break
        self.refresh(*_CHANGING)
        return record

    def run(self) -> int:
        """Step until all requests have ended; how many steps that took."""
        steps = 0
        while steps < MOST_STEPS and self._step() is not None:
            steps += 1
        self.refresh(*_CHANGING)
        return steps

    def restart(self, **knobs: Any) -> None:
        """Begin again with the same requests, at the same steps, and with changed `knobs` (max_num_seqs, max_tokens_per_step,
        kv_blocks, prefix_cache, batching)."""
        for name in knobs:
            if name not in Knobs.__dataclass_fields__:
                raise InputError(f"there is no knob {name!r}: known are {', '.join(Knobs.__dataclass_fields__)}")
        self._restart(**knobs)
        self.refresh()

    def play(self) -> None:
        """Step by itself, at the speed that the slider says, until nothing is left to do; returns at once."""
        with self.lock:
            self.on_play("", None)
        self.refresh("controls")

    def pause(self) -> None:
        """Stop playing after the step that runs."""
        with self.lock:
            self._player.pause()
        self.refresh("controls")

    def close(self) -> None:
        """Stop, and free what runs."""
        self._run.closed = True
        self._player.close()
        self._run.close()

    # What the page's controls do. A step may take a while, so the worker does it.

    def on_play(self, key: str, value: Any) -> list[str]:
        self.looked = None
        self._player.play()
        return ["controls"]

    def on_pause(self, key: str, value: Any) -> list[str]:
        self._player.pause()
        return ["controls"]

    def on_step(self, key: str, value: Any) -> list[str]:
        self.looked = None
        self._player.later(self._step)
        return []

    def on_again(self, key: str, value: Any) -> list[str]:
        self._player.later(self._restart)
        return []

    def on_clear(self, key: str, value: Any) -> list[str]:
        self._player.later(lambda: self._restart(forget=True))
        return []

    def on_knob(self, key: str, value: Any) -> list[str]:
        if key in ("max_num_seqs", "max_tokens_per_step", "kv_blocks"):
            number = int(value) if isinstance(value, float) and value.is_integer() else value
            changed: dict[str, Any] = {key: number}
            self._player.later(lambda: self._restart(**changed))
        return []

    def on_prefix(self, key: str, value: Any) -> list[str]:
        self._player.later(lambda: self._restart(prefix_cache=bool(value)))
        return []

    def on_batching(self, key: str, value: Any) -> list[str]:
        self._player.later(lambda: self._restart(batching=value))
        return []

    def on_speed(self, key: str, value: Any) -> list[str]:
        self._player.set_speed(float(value))
        return ["controls"]

    def on_look(self, key: str, value: Any) -> list[str]:
        place = int(key) if key else int(value) - 1
        self.looked = None if place >= len(self.steps) - 1 else max(place, 0)
        return ["status", "timeline", "blocks"]

    def on_submit(self, key: str, value: Any) -> list[str]:
        fields = value if isinstance(value, dict) else {}
        prompts = [line.strip() for line in str(fields.get("prompts", "")).splitlines() if line.strip()]
        if not prompts:
            raise InputError("no prompt there: type one a line")
        most = fields.get("max_tokens", 16)
        self._run.live().submit(prompts, max_tokens=int(most) if isinstance(most, float) else most)
        self._note = ""
        return ["status", "requests"]

    def on_cancel(self, key: str, value: Any) -> list[str]:
        self._run.live().cancel(key)
        return ["requests"]

    # Stepping.

    def _step(self) -> StepRecord | None:
        """One step, while the panel can be drawn."""
        record = self._run.step()
        with self.lock:
            self._note = "" if record is not None else self._run.ended
            if record is None:
                self._player.pause()
        return record

    def _restart(self, *, forget: bool = False, **knobs: Any) -> None:
        self._run.restart(forget=forget, **knobs)
        with self.lock:
            self.looked, self._note = None, ""

    def _done(self, of_task: bool, problem: str) -> None:
        """After a step or a task of the player."""
        with self.lock:
            before, self.problem = self.problem, problem
            regions = [*_CHANGING, *([] if self.playing else ["controls"]), *(["knobs"] if of_task else [])]
            regions += ["problem"] if before or problem else []
        self.refresh(*regions)
