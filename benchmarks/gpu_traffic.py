"""Requests on one open backend: fixed lengths with what they cost, and mixed lengths in flight against static batches.

Mixed lengths are those of real traffic, most short and some long: prompts and outputs are lognormal with a mean of about 128
tokens (sigma 1), prompts from 16 and outputs from 4 tokens up to 512. A static batch takes 64 requests in the order of arrival and
runs until the longest of them ends: those that are finished keep their places in every step, as where sequences are padded.
Only the tokens that were asked for count.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmlab.cuda.energy import EnergyMeter
from llmlab.runtime.core import EngineCore
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request
from llmlab.speed import drive

MEAN, SIGMA = 128, 1.0
PROMPT, OUTPUT = (16, 512), (4, 512)
"""Shortest and longest, in tokens."""


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


def lengths(count: int, seed: int = 1) -> NDArray[np.int64]:
    """[count, 2]: tokens in and out."""
    random = np.random.default_rng(seed)
    drawn = random.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, (count, 2))
    return np.clip(np.rint(drawn), (PROMPT[0], OUTPUT[0]), (PROMPT[1], OUTPUT[1])).astype(np.int64)


def mixed(backend: Any, wanted: NDArray[np.int64], batching: str) -> dict[str, Any]:
    """Requests of these lengths, all there at once."""
    random = np.random.default_rng(2)
    core = core_of(backend, batching=batching)
    outputs = wanted[:, 1].copy()
    if batching == "static":
        for start in range(0, len(outputs), backend.max_batch):
            outputs[start : start + backend.max_batch] = outputs[start : start + backend.max_batch].max()
    for number, (prompt, output) in enumerate(zip(wanted[:, 0], outputs, strict=True)):
        params = SamplingParams(max_tokens=int(output), ignore_eos=True, temperature=0, top_k=0, top_p=1)
        ids = random.integers(0, backend.limits.vocab_size, prompt)
        core.add(Request(id=str(number), prompt_ids=ids, params=params))
    steps: dict[str, list[float]] = defaultdict(list)
    start = time.perf_counter()
    while core.has_work:
        began = time.perf_counter()
        core.step()
        kind = "mixed" if core.stats.last.prefill_tokens else "decode"
        steps[kind].append(time.perf_counter() - began)
    seconds = time.perf_counter() - start
    core.check_integrity()
    kinds = {kind: {"steps": len(s), "mean_ms": float(np.mean(s)) * 1e3} for kind, s in steps.items()}
    return {"seconds": seconds, "tokens_per_s": int(wanted[:, 1].sum()) / seconds, **kinds}


def inflight_against_static(backend: Any, count: int = 256, repeat: int = 1) -> dict[str, Any]:
    """The same requests both ways, interleaved; the best of `repeat` after one of each that doesn't count."""
    wanted = lengths(count)
    runs: dict[str, list[dict[str, Any]]] = {"inflight": [], "static": []}
    for _ in range(repeat + 1):
        for batching, found in runs.items():
            found.append(mixed(backend, wanted, batching))
    best = {batching: min(found[1:], key=lambda r: r["seconds"]) for batching, found in runs.items()}
    means = {"prompt": float(wanted[:, 0].mean()), "output": float(wanted[:, 1].mean())}
    ratio = best["static"]["seconds"] / best["inflight"]["seconds"]
    return {**best, "requests": count, "mean_tokens": means, "ratio": ratio}
