"""Requests on one open backend: fixed lengths with what they cost, and mixed lengths in flight against static batches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from llmlab.cuda.energy import EnergyMeter
from llmlab.runtime.core import EngineCore
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request
from llmlab.speed import drive

PROMPT, OUTPUT = (16, 256), (16, 256)
"""Shortest and longest, in tokens; uniform between."""


def core_of(backend: Any, **options: Any) -> EngineCore:
    limits = backend.limits
    return EngineCore(
        backend, max_num_seqs=backend.max_batch, max_tokens_per_step=limits.max_tokens_per_step, **options
    )


def fixed(backend: Any, meter: EnergyMeter, size: int, prompt: int, output: int, repeat: int) -> dict[str, Any]:
    """`size` sequences of `prompt` tokens in and `output` out, the best of `repeat` runs after one that doesn't count."""
    random = np.random.default_rng(0)
    core = core_of(backend)
    runs = []
    for _ in range(repeat + 1):
        prefill, _ = drive(core, size, prompt, 1, random)
        before = meter.joules
        seconds, steps = drive(core, size, prompt, output, random)
        after = meter.joules
        energy = None if before is None or after is None else (after - before) / (size * output)
        step = sum(s for s, _ in steps) / len(steps)
        runs.append((seconds, prefill, step, energy))
    seconds, prefill, step, energy = min(runs[1:], key=lambda r: r[0])
    return {
        "batch": size,
        "prompt": prompt,
        "output": output,
        "tokens_per_s": size * output / seconds,
        "decode_tokens_per_s": size / step,
        "decode_step_ms": step * 1e3,
        "first_token_ms": prefill * 1e3,
        "prefill_tokens_per_s": size * prompt / prefill,
        "joules_per_token": energy,
    }


def mixed(backend: Any, count: int, batching: str) -> dict[str, Any]:
    """`count` requests of mixed lengths, all there at once; a static batch ends with its longest member."""
    random = np.random.default_rng(1)
    core = core_of(backend, batching=batching)
    lengths = random.integers((PROMPT[0], OUTPUT[0]), (PROMPT[1] + 1, OUTPUT[1] + 1), (count, 2))
    for number, (prompt, output) in enumerate(lengths):
        params = SamplingParams(max_tokens=int(output), ignore_eos=True, temperature=0, top_k=0, top_p=1)
        ids = random.integers(0, backend.limits.vocab_size, prompt)
        core.add(Request(id=str(number), prompt_ids=ids, params=params))
    start = time.perf_counter()
    while core.has_work:
        core.step()
    seconds = time.perf_counter() - start
    core.check_integrity()
    return {"seconds": seconds, "steps": core.stats.total.steps, "tokens_per_s": int(lengths[:, 1].sum()) / seconds}


def inflight_against_static(backend: Any, count: int = 256, repeat: int = 2) -> dict[str, Any]:
    """The same requests both ways, interleaved; the best of `repeat` after one of each that doesn't count."""
    runs: dict[str, list[dict[str, Any]]] = {"inflight": [], "static": []}
    for _ in range(repeat + 1):
        for batching, found in runs.items():
            found.append(mixed(backend, count, batching))
    best = {batching: min(found[1:], key=lambda r: r["seconds"]) for batching, found in runs.items()}
    return {**best, "requests": count, "ratio": best["static"]["seconds"] / best["inflight"]["seconds"]}
