"""What running an engine costs: its size, memory, load time, speed, energy and price. Measured in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmlab.errors import EngineError, InputError
from llmlab.quant.recipe import Recipe
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import Manifest
from llmlab.speed import BenchRow

BATCHES = (1, 8)
PROMPT, OUTPUT = 64, 32
_LONGEST = 3600.0  # seconds that a measurement may take


@dataclass(frozen=True)
class Cost:
    """Of one engine on this machine."""

    size_bytes: int
    """Of the engine folder's files."""
    load_s: float
    """From the folder to an engine that answers, hashes checked; libraries are loaded before."""
    peak_bytes: int
    """Most resident memory of the process, Python and its libraries included; on a GPU the host's."""
    engine_bytes: int
    """The same over what the process had before it opened the engine."""
    speed: tuple[BenchRow, ...]
    """One entry a batch size."""
    joules_per_token: float | None = None
    """Of the GPU that it runs on, else of all processors, per generated token at the largest batch, its prompt included; None where it
    can't be read."""
    price_per_million: float | None = None
    """Of a million generated tokens at the largest batch, prompts included, in the price's currency."""
    unfit: str = ""
    """Why this machine's speed says nothing about the precision: it is computed exactly, but not by hardware for it."""

    @property
    def decode(self) -> float:
        """Generated tokens a second at the smallest batch."""
        return self.speed[0].decode_tokens_per_s

    def better(self, other: Cost) -> Cost:
        """Two measurements of one engine as one: of each number the better, which is the less disturbed."""
        rows = tuple(_better(one, two) for one, two in zip(self.speed, other.speed, strict=True))
        joules = [j for j in (self.joules_per_token, other.joules_per_token) if j is not None]
        prices = [p for p in (self.price_per_million, other.price_per_million) if p is not None]
        return replace(
            self,
            load_s=min(self.load_s, other.load_s),
            peak_bytes=min(self.peak_bytes, other.peak_bytes),
            engine_bytes=min(self.engine_bytes, other.engine_bytes),
            speed=rows,
            joules_per_token=min(joules, default=None),
            price_per_million=min(prices, default=None),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speed": [asdict(row) for row in self.speed], "speed_counts": not self.unfit}

    def facts(self) -> dict[str, str]:
        """One line each, to be shown."""
        lines = {
            "size": f"{self.size_bytes / 1e6:,.1f} MB",
            "memory": f"{self.peak_bytes / 1e6:,.0f} MB at most, {self.engine_bytes / 1e6:,.0f} of them the engine's",
            "load": f"{self.load_s * 1e3:,.0f} ms",
        }
        for row in self.speed:
            lines[f"speed, B={row.batch}"] = (
                f"prefill {row.prefill_tokens_per_s:,.0f}, decode {row.decode_tokens_per_s:,.1f} tokens/s, "
                f"first token {row.first_token_ms:,.1f} ms"
            )
        if self.unfit:
            lines["speed doesn't count"] = self.unfit
        if self.joules_per_token is not None:
            lines["energy"] = f"{self.joules_per_token:.3g} J a token"
        if self.price_per_million is not None:
            lines["price"] = f"{self.price_per_million:,.3g} a million tokens"
        return lines


def measure_costs(
    engine: Engine, *, threads: int | None = None, price_per_hour: float | None = None, repeat: int = 2
) -> Cost:
    """Open the engine in a fresh process and measure there. Of `repeat` measurements of speed, the best.

    Raises InputError for a price that isn't one, EngineError where the process fails.
    """
    check_price(price_per_hour)
    asked = {"engine": str(engine.path.absolute()), "threads": threads, "repeat": repeat}
    command = [sys.executable, "-m", "llmlab.evaluate.costs_process", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST)
    except subprocess.TimeoutExpired as problem:
        raise EngineError(f"{engine.path}: measuring its costs took more than {_LONGEST / 60:.0f} minutes") from problem
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineError(f"{engine.path}: measuring its costs failed: {reason}")
    found = json.loads(last)
    speed = tuple(BenchRow(**row) for row in found.pop("speed"))
    price = None if price_per_hour is None else price_per_hour / 3600 / speed[-1].tokens_per_s * 1e6
    return Cost(size_bytes=engine.size, speed=speed, price_per_million=price, unfit=unfit(engine.manifest), **found)


def check_price(price_per_hour: float | None) -> None:
    if price_per_hour is None:
        return
    fine = isinstance(price_per_hour, (int, float)) and not isinstance(price_per_hour, bool)
    if not fine or not 0 <= price_per_hour < math.inf:
        raise InputError(f"price_per_hour is {price_per_hour!r}, expected a number of at least 0")


def unfit(manifest: Manifest) -> str:
    """Why the speed of this engine says nothing about its precision, if so."""
    _, rounds, half = manifest.precision.partition(" rounded to ")
    if rounds:
        return f"{manifest.target} rounds to {half} exactly, and computes in float32"
    if manifest.kv.rounding:
        return (
            f"{manifest.target} keeps keys and values that are rounded to {manifest.kv.rounding} in {manifest.kv.dtype}"
        )
    if manifest.target == "onnxruntime" and manifest.recipe:
        recipe = Recipe.parse(manifest.recipe)
        parts = [recipe.weights, recipe.activations, *(p for o in recipe.layers for p in (o.weights, o.activations))]
        if any(part is not None and part.dtype == "fp8" for part in parts):
            return f"{manifest.target} rounds to fp8 exactly, and computes in float32"
    return ""


def _better(one: BenchRow, two: BenchRow) -> BenchRow:
    return BenchRow(
        one.batch,
        one.prompt_len,
        one.output_len,
        prefill_tokens_per_s=max(one.prefill_tokens_per_s, two.prefill_tokens_per_s),
        decode_tokens_per_s=max(one.decode_tokens_per_s, two.decode_tokens_per_s),
        tokens_per_s=max(one.tokens_per_s, two.tokens_per_s),
        first_token_ms=min(one.first_token_ms, two.first_token_ms),
        decode_step_ms=min(one.decode_step_ms, two.decode_step_ms),
        outside_backend_share=min(one.outside_backend_share, two.outside_backend_share),
    )
