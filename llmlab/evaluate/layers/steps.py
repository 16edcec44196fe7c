"""The two steps that engines are looked at in: every sequence decodes a token, or prompts are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from llmlab.errors import InputError
from llmlab.evaluate.layers.model import PHASES
from llmlab.runtime.batch import EngineLimits, StepBatch

T = TypeVar("T")
_WARM = 2


@dataclass(frozen=True)
class Steps:
    """What is run."""

    context: int
    """Tokens that a sequence has before the token that it decodes."""
    prompt: int
    """Tokens of a prompt that is read whole."""
    batch: int
    """Sequences that decode. A prompt is read alone."""
    repeat: int
    """Runs of each step, after some that don't count."""
    seconds: float = 2.0
    """Fewer runs where these would take longer, three at least."""

    @classmethod
    def fit(cls, limits: EngineLimits, context: int | None, prompt: int | None, batch: int, repeat: int) -> Steps:
        """With what isn't given chosen to fit an engine. Raises InputError for what doesn't fit."""
        longest = limits.max_seq_len
        chosen = cls(
            min(128, longest - 1) if context is None else context,
            min(128, longest, limits.max_tokens_per_step) if prompt is None else prompt,
            batch,
            repeat,
        )
        most = {
            "context": longest - 1,
            "prompt": min(longest, limits.max_tokens_per_step),
            "batch": limits.max_tokens_per_step,
            "repeat": 1000,
        }
        for name, limit in most.items():
            given = getattr(chosen, name)
            if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= limit:
                raise InputError(f"{name} is {given!r}, expected an integer from 1 to {limit} for this engine")
        return chosen

    def make(self, phase: str, vocab: int) -> StepBatch:
        """The step's inputs: random tokens, a block for each sequence."""
        random = np.random.default_rng(0)
        batch, new, past = (1, self.prompt, 0) if phase == "prefill" else (self.batch, 1, self.context)
        tokens = batch * new
        return StepBatch(
            input_ids=random.integers(0, vocab, tokens),
            position_ids=np.tile(np.arange(past, past + new), batch),
            query_start=np.arange(0, tokens + 1, new, dtype=np.int32),
            kv_len=np.full(batch, past + new, np.int32),
            block_table=np.arange(batch, dtype=np.int32)[:, None],
            logits_index=np.arange(new - 1, tokens, new),
        )

    def tokens(self, phase: str) -> int:
        """New tokens of a step."""
        return self.prompt if phase == "prefill" else self.batch

    def keys(self, phase: str) -> tuple[int, int]:
        """(keys that the sequences' new tokens look at, all together; keys that are read from the cache or written)."""
        if phase == "prefill":
            return self.prompt * (self.prompt + 1) // 2, 2 * self.prompt
        return self.batch * (self.context + 1), self.batch * (self.context + 2)

    def run(
        self, execute: Callable[[StepBatch], object], vocab: int, stop: threading.Event | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each run by phase, those of the warm-up too. Raises KeyboardInterrupt once `stop` is set."""
        taken: dict[str, list[float]] = {}
        for phase in PHASES:
            batch, times = self.make(phase, vocab), taken.setdefault(phase, [])
            began = time.perf_counter()
            while len(times) < _WARM + self.repeat:
                if len(times) >= _WARM + 3 and time.perf_counter() - began > self.seconds:
                    break
                if stop is not None and stop.is_set():
                    raise KeyboardInterrupt
                start = time.perf_counter()
                execute(batch)
                times.append(time.perf_counter() - start)
        return taken

    @staticmethod
    def counted(runs: Sequence[T]) -> Sequence[T]:
        """Without those that warmed up."""
        return runs[_WARM:]

    @classmethod
    def best(cls, times: Sequence[float]) -> float:
        """The mean of the fastest quarter of the runs that count, which were disturbed least."""
        order = sorted(cls.counted(times))
        return fmean(order[: max(1, len(order) // 4)])

    def to_dict(self) -> dict[str, Any]:
        return {name: number for name, number in asdict(self).items() if name != "seconds"}
