"""What the engine counts about its steps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class StepStats:
    """Counts and seconds of one step, or of many."""

    steps: int = 0
    sequences: int = 0
    """Rows of the batch; summed over steps."""
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from another sequence."""
    preemptions: int = 0
    dropped_tokens: int = 0
    """Of all these, computed for sequences that turned out to have ended."""
    execute_s: float = 0.0
    """In the backend: executing steps; or handing them over, and waiting for them when there is nothing else to do."""
    step_s: float = 0.0
    """In all of step()."""

    def add(self, other: StepStats) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class CoreStats:
    last: StepStats = field(default_factory=StepStats)
    total: StepStats = field(default_factory=StepStats)

    def note(self, step: StepStats) -> None:
        self.last = step
        self.total.add(step)
