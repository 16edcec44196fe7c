"""What the monitor steps through: requests that run now, or a recorded run."""

from __future__ import annotations

import threading
from typing import Any

from llmlab.errors import InputError
from llmlab.runtime.trace import StepRecord, Trace
from llmlab.widgets.monitor.traffic import Traffic


class Run:
    """Does, or replays, one step after the other. `step` and `restart` exclude each other and may come from any thread."""

    def __init__(self, what: Traffic | Trace) -> None:
        self.traffic = what if isinstance(what, Traffic) else None
        """None: a recorded run is replayed."""
        self._recorded = what if isinstance(what, Trace) else None
        self._shown = len(what.steps) if isinstance(what, Trace) else 0
        self._turn = threading.Lock()
        self.closed = False

    @property
    def title(self) -> str:
        if self.traffic is None:
            return f"a recorded run, {self.trace}"
        return f"{self.traffic.source.name} ({self.traffic.source.kind})"

    @property
    def trace(self) -> Trace:
        """All steps; of a replay also those to come."""
        if self.traffic is not None:
            return self.traffic.trace
        assert self._recorded is not None
        return self._recorded

    @property
    def steps(self) -> list[StepRecord]:
        """The steps done so far."""
        return self.trace.steps if self._recorded is None else self.trace.steps[: self._shown]

    @property
    def ended(self) -> str:
        """What to say when there is no next step."""
        return "That was the last step." if self.traffic is None else "All requests are done: submit another."

    def view(self, looked: int | None) -> tuple[Trace, list[StepRecord], int]:
        """Trace, steps done, and index of the one that is looked at (None: the last), of one moment: another thread may begin again."""
        trace = self.trace
        steps = trace.steps if self._recorded is None else trace.steps[: self._shown]
        last = len(steps) - 1
        return trace, steps, last if looked is None else min(looked, last)

    def step(self) -> StepRecord | None:
        """The next step; None if there is nothing to do."""
        with self._turn:
            if self.closed:
                raise InputError("this monitor was closed: make a new one")
            if self.traffic is not None:
                return self.traffic.step()
            more = self._shown < len(self.trace.steps)
            self._shown += more
            return self.trace.steps[self._shown - 1] if more else None

    def restart(self, *, forget: bool = False, **knobs: Any) -> None:
        """Begin again, with the same requests unless `forget`, and with changed knobs."""
        with self._turn:
            if self.traffic is None:
                self._shown = 0
            else:
                self.traffic.restart(forget=forget, **knobs)

    def live(self) -> Traffic:
        """What runs. InputError where a recorded run is replayed."""
        if self.traffic is None:
            raise InputError("a recorded run is replayed here, nothing runs: give a graph or an engine")
        return self.traffic

    def close(self) -> None:
        """Free what runs; there is no step after this."""
        self.closed = True
        if self.traffic is not None:
            self.traffic.close()
