"""Latencies of an engine at several batch sizes: every first token and every gap between two tokens, and not only their means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmlab.errors import InputError
from llmlab.evaluate.layers.measure import layers
from llmlab.evaluate.layers.model import EngineLayers
from llmlab.evaluate.roofline import Point
from llmlab.runtime.engine import Engine
from llmlab.speed import drive


@dataclass(frozen=True)
class Latencies:
    """What was measured at one batch size, in seconds."""

    batch: int
    prompt: int
    output: int
    first_token: tuple[float, ...]
    """Until all sequences that began together had their first token, of each run."""
    between_tokens: tuple[float, ...]
    """Of each step in which every sequence got a token."""
    whole: tuple[float, ...]
    """Of each run, from its first prompt to its last token."""

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, prompts included, in the fastest run."""
        return self.batch * self.output / min(self.whole)

    def percentile(self, what: str, share: float) -> float:
        """Seconds that `share` (0 to 100) of the first tokens, or of the gaps, stayed below."""
        return float(np.percentile(getattr(self, what), share))

    def to_dict(self) -> dict[str, Any]:
        names = ("first_token", "between_tokens")
        shares = {f"{name}_p{share}": self.percentile(name, share) for name in names for share in (50, 90, 99)}
        return {**vars(self), **shares, "tokens_per_s": self.tokens_per_s}


def measure_latencies(
    engine: Engine,
    batches: Sequence[int],
    *,
    prompt: int,
    output: int,
    repeat: int,
    threads: int | None,
    stop: threading.Event,
    done: Callable[[Latencies], object],
) -> None:
    """Call `done` with each batch size's latencies, when they are known. Raises KeyboardInterrupt once `stop` is set, InputError for
    lengths that the engine doesn't hold."""
    from llmlab.runtime.llm import LLM

    limits = engine.manifest.limits
    if prompt + output > limits.max_seq_len:
        raise InputError(
            f"prompt and output are {prompt} + {output} tokens, this engine holds {limits.max_seq_len}: give smaller ones"
        )
    random = np.random.default_rng(0)
    with LLM(engine, threads=threads, max_num_seqs=max(batches)) as llm:
        for size in batches:
            drive(llm.core, size, prompt, min(output, 4), random, stop)  # warms up
            first, between, whole = [], [], []
            for _ in range(repeat):
                first.append(drive(llm.core, size, prompt, 1, random, stop)[0])
                seconds, steps = drive(llm.core, size, prompt, output, random, stop)
                whole.append(seconds)
                between += [step for step, _ in steps]
            done(Latencies(size, prompt, output, tuple(first), tuple(between), tuple(whole)))


def points(
    engine: Engine, batches: Sequence[int], prompt: int, threads: int | None, stop: threading.Event
) -> list[Point]:
    """Prefill, and decode at each batch size after `prompt` tokens, for a roofline: bytes and operations from the engine's own layers,
    seconds of the whole step without a profiler."""
    found: list[Point] = []
    for number, size in enumerate(batches):
        seen = layers(engine, context=prompt, prompt=prompt, batch=size, repeat=8, threads=threads, stop=stop)
        if number == 0 and "prefill" in seen.step:
            found.append(_point(f"prefill, {prompt} tokens", seen, "prefill"))
        if "decode" in seen.step:
            found.append(_point(f"decode, B={size}", seen, "decode"))
    return found


def _point(label: str, seen: EngineLayers, phase: str) -> Point:
    return Point(label, seen.flops(phase), seen.bytes(phase), seen.step[phase])
