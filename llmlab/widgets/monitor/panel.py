"""`llmlab.monitor`: in-flight batching, one scheduler step at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from llmlab.errors import InputError
from llmlab.runtime.params import checked_integer
from llmlab.runtime.trace import StepRecord, Trace
from llmlab.widgets.monitor import draw
from llmlab.widgets.monitor.player import Player
from llmlab.widgets.monitor.sources import source_of
from llmlab.widgets.monitor.timeline import MEANINGS, timeline
from llmlab.widgets.monitor.traffic import Knobs, Prompt, Traffic
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
        self._traffic = what if isinstance(what, Traffic) else None
        self._recorded = what if isinstance(what, Trace) else None
        self._shown = len(what.steps) if isinstance(what, Trace) else 0
        self._player = Player(self.lock, step=self._step, done=self._done)
        self.looked: int | None = None
        """Index of the step that is looked at; None: the last one."""
        self._note = ""
        self._stepping = threading.Lock()
        self._closed = False

    # What the page shows.

    @property
    def trace(self) -> Trace:
        """All steps; of a replay also those to come."""
        if self._traffic is not None:
            return self._traffic.trace
        assert self._recorded is not None
        return self._recorded

    @property
    def steps(self) -> list[StepRecord]:
        """The steps done so far."""
        return self.trace.steps if self._recorded is None else self.trace.steps[: self._shown]

    @property
    def playing(self) -> bool:
        """Whether it steps by itself."""
        return self._player.playing

    @property
    def core(self) -> EngineCore:
        """The engine core that runs. InputError where a trace is replayed."""
        return self._live().core

    def title(self) -> str:
        if self._traffic is None:
            return f"Batching monitor: a recorded run, {self.trace}"
        return f"Batching monitor: {self._traffic.source.name} ({self._traffic.source.kind})"

    def draw_controls(self) -> Markup:
        return draw.controls(self.playing, self._player.speed, self._traffic is None)

    def draw_knobs(self) -> Markup:
        return draw.knobs(None if self._traffic is None else self._traffic.knobs, self.trace)

    def draw_status(self) -> Markup:
        return draw.status(*self._view(), self._note)

    def draw_timeline(self) -> Markup:
        trace, steps, looked = self._view()
        if not steps:
            return Markup("")
        prompts = {} if self._traffic is None else {s.name: s.prompt for s in self._traffic.submissions}
        return timeline(trace, steps, looked, prompts)

    def draw_blocks(self) -> Markup:
        trace, steps, looked = self._view()
        return draw.block_map(trace, steps[looked] if steps else None)

    def draw_submit(self) -> Markup:
        return Markup("") if self._traffic is None else draw.submit("")

    def draw_requests(self) -> Markup:
        if self._traffic is None:
            return Markup("")
        _, steps, _ = self._view()
        last = steps[-1].sequences if steps else ()
        return draw.requests(self._traffic, {s.name: MEANINGS[s.state][1].partition(":")[0] for s in last})

    def draw_problem(self) -> str:
        return self._draw_problem()

    def to_dict(self) -> dict[str, Any]:
        """All steps as plain data, and the requests with their answers."""
        with self.lock:
            shown = {"panel": self.name, "title": self.title(), "trace": self.trace.to_dict()}
            return shown if self._traffic is None else shown | self._traffic.to_dict()

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
        many: Sequence[Any] = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else prompts
        with self.lock:
            names = self._live().submit(many, max_tokens=max_tokens, ignore_eos=ignore_eos, at=at)
            self._note = ""
        self.refresh("status", "requests")
        return names

    def cancel(self, name: str) -> None:
        """End a request before the next step."""
        self._live().cancel(name)
        self.refresh("requests")

    def step(self, count: int = 1) -> StepRecord | None:
        """Do `count` steps, each exactly one of the core, and wait for them; the last one, None if there was nothing to do."""
        record = None
        for _ in range(checked_integer("count", count, low=1)):
            record = self._step()
            if record is None:
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
        self._closed = True
        self._player.close()
        if self._traffic is not None:
            self._traffic.close()

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
        self._live().submit(prompts, max_tokens=int(most) if isinstance(most, float) else most)
        self._note = ""
        return ["status", "requests"]

    def on_cancel(self, key: str, value: Any) -> list[str]:
        self._live().cancel(key)
        return ["requests"]

    # Stepping.

    def _step(self) -> StepRecord | None:
        """One step, while the panel can be drawn."""
        with self._stepping:
            if self._closed:
                raise InputError("this monitor was closed: make a new one")
            if self._traffic is None:
                more = self._shown < len(self.trace.steps)
                self._shown += more
                record = self.trace.steps[self._shown - 1] if more else None
            else:
                record = self._traffic.step()
        with self.lock:
            self._note = "" if record is not None else self._nothing()
            if record is None:
                self._player.pause()
        return record

    def _nothing(self) -> str:
        return "That was the last step." if self._traffic is None else "All requests are done: submit another."

    def _restart(self, *, forget: bool = False, **knobs: Any) -> None:
        with self._stepping:
            if self._traffic is None:
                self._shown = 0
            else:
                self._traffic.restart(forget=forget, **knobs)
        with self.lock:
            self.looked, self._note = None, ""

    def _done(self, of_task: bool, problem: str) -> None:
        """After a step or a task of the player."""
        with self.lock:
            before, self.problem = self.problem, problem
            regions = [*_CHANGING, *([] if self.playing else ["controls"]), *(["knobs"] if of_task else [])]
            regions += ["problem"] if before or problem else []
        self.refresh(*regions)

    def _view(self) -> tuple[Trace, list[StepRecord], int]:
        """Trace, steps done, and index of the one that is looked at, of one moment: another thread may begin again."""
        trace = self.trace
        steps = trace.steps if self._recorded is None else trace.steps[: self._shown]
        last = len(steps) - 1
        return trace, steps, last if self.looked is None else min(self.looked, last)

    def _live(self) -> Traffic:
        if self._traffic is None:
            raise InputError("a recorded run is replayed here, nothing runs: give a graph or an engine")
        return self._traffic


def _is_ids(prompts: Any) -> bool:
    return len(prompts) > 0 and not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__")
