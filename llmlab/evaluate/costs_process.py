"""Run by `costs`: opens one engine in a fresh process, measures, prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.errors import LlmlabError
from llmlab.evaluate.energy import Meter, meter_of


def main(asked: dict[str, Any]) -> dict[str, Any]:
    from llmlab.evaluate.costs import BATCHES, OUTPUT, PROMPT
    from llmlab.runtime.engine import Engine
    from llmlab.runtime.llm import LLM
    from llmlab.speed import measure_open

    manifest = Engine.load(asked["engine"]).manifest
    if manifest.target == "onnxruntime":
        import onnxruntime  # noqa: F401 (a library's own time and memory are not the engine's)
    before = _memory("VmRSS")
    sizes = [size for size in BATCHES if size <= manifest.max_num_seqs]
    began = time.perf_counter()
    with LLM(Engine.load(asked["engine"]), threads=asked["threads"], max_num_seqs=max(sizes)) as llm:
        load_s = time.perf_counter() - began
        longest = llm.core.backend.limits.max_seq_len
        output = min(OUTPUT, longest // 2)
        prompt = min(PROMPT, longest - output)
        rows = measure_open(llm, sizes, prompt_len=prompt, output_len=output, repeat=asked["repeat"])
        peak = _memory("VmHWM")
        joules = _joules(llm, meter_of(llm.core.backend), max(sizes), prompt, output)
    return {
        "load_s": load_s,
        "peak_bytes": peak,
        "engine_bytes": peak - before,
        "speed": [asdict(row) for row in rows],
        "joules_per_token": joules,
    }


def _joules(llm: Any, meter: Meter, batch: int, prompt: int, output: int) -> float | None:
    """Per generated token of runs like those of the last batch; None where nothing can be read."""
    from llmlab.speed import drive

    if not meter.readable:
        return None
    random, runs, began = np.random.default_rng(0), 0, time.perf_counter()
    before = meter.joules()
    while not runs or time.perf_counter() - began < meter.least_s:
        drive(llm.core, batch, prompt, output, random)
        runs += 1
    taken = meter.joules() - before
    return taken / (runs * batch * output) if meter.readable else None


def _memory(what: str) -> int:
    """VmRSS, resident now, or VmHWM, its most so far, in bytes. (ru_maxrss would start with the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024
    raise LlmlabError(f"/proc/self/status has no {what}")


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except LlmlabError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
