"""In-flight batching against static batches of 8 on one engine: 64 requests of mixed lengths, all there at once.

    python benchmarks/inflight.py --cache CACHE --json benchmarks/results/inflight.json

A static batch is admitted together, and the next one when its last member has ended; nothing is padded in either mode.
`overhead` is the share of step time outside ONNX Runtime's own call: scheduling, packing, binding, sampling.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
from shapes import checkpoint, engine

import llmlab as ll
from llmlab.zoo.shapes import SHAPES

PROMPT, OUTPUT = (8, 384), (4, 192)
"""Shortest and longest, in tokens; uniform between."""
STATIC_BATCH = 8


def requests(count: int, vocab: int, seed: int) -> tuple[list[list[int]], list[ll.SamplingParams]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, vocab, length).tolist() for length in rng.integers(*PROMPT, count, endpoint=True)]
    params = [
        ll.SamplingParams(max_tokens=int(length), temperature=0.0, ignore_eos=True)
        for length in rng.integers(*OUTPUT, count, endpoint=True)
    ]
    return prompts, params


def measure(folder: Path, batching: str, max_num_seqs: int, work: Any, threads: int) -> dict[str, Any]:
    """One run over all requests with an LLM of its own, so that only one thread pool exists."""
    prompts, params = work
    with ll.LLM(folder, threads=threads, max_num_seqs=max_num_seqs, batching=batching) as llm:
        short = ll.SamplingParams(max_tokens=4, ignore_eos=True)
        llm.generate(prompts[:max_num_seqs], short, progress=False)  # warm-up
        total, backend = llm.core.stats.total, llm.core.backend
        before = (total.steps, total.step_s, backend.run_seconds)
        meter, cpu, began = machine.Meter(), time.process_time(), time.perf_counter()
        results = llm.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - began
        foreign = meter.foreign_share(time.process_time() - cpu)
        llm.core.check_integrity()
        steps, step_s, run_s = (
            after - b for after, b in zip((total.steps, total.step_s, backend.run_seconds), before, strict=True)
        )
    tokens = [len(result.token_ids) for result in results]
    if tokens != [p.max_tokens for p in params]:
        raise RuntimeError("a request ended before its output length")
    p50, p95 = np.percentile([result.metrics.ttft_s for result in results], (50, 95))
    return {
        "seconds": seconds,
        "tokens_per_s": sum(tokens) / seconds,
        "steps": steps,
        "ttft_p50_s": float(p50),
        "ttft_p95_s": float(p95),
        "overhead": 1 - run_s / step_s,
        "outside_steps": 1 - step_s / seconds,
        "foreign": foreign,
        "outputs": [result.token_ids for result in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for checkpoints and engines")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, nargs="+", default=[8, 16, 32, 64], help="for in-flight batching")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all samples")
    args = parser.parse_args()

    folder = engine(checkpoint(args.shape, args.cache.resolve()), args.cache.resolve(), sum((PROMPT[1], OUTPUT[1])))
    work = requests(args.requests, SHAPES[args.shape]["vocab_size"], args.seed)
    modes = [("static", STATIC_BATCH), *(("inflight", size) for size in args.max_num_seqs)]
    runs: dict[str, list[dict[str, Any]]] = {f"{batching} {size}": [] for batching, size in modes}
    for repetition in range(args.repetitions):
        for batching, size in modes:
            runs[f"{batching} {size}"].append(measure(folder, batching, size, work, args.threads))
            print(f"\rrepetition {repetition + 1}: {batching} {size}\033[K", end="", file=sys.stderr)
    print("\r\033[K", end="", file=sys.stderr)

    about = machine.describe()
    prompts, params = work
    print(machine.summary(about))
    print(f"{args.shape}, fp32, {args.threads} threads: {args.requests} requests, {sum(map(len, prompts))} tokens in,")
    print(f"{sum(p.max_tokens for p in params)} out; median of {args.repetitions} interleaved repetitions\n")
    print(f"{'batching':<14}{'tokens/s':>10}{'× static':>10}{'steps':>7}{'TTFT p50':>10}{'p95':>9}{'overhead':>10}")
    base = runs[f"static {STATIC_BATCH}"]
    for name, samples in runs.items():
        value = {key: median(s[key] for s in samples) for key in samples[0] if key not in ("outputs", "foreign")}
        ratio = median(s["tokens_per_s"] / b["tokens_per_s"] for s, b in zip(samples, base, strict=True))
        print(
            f"{name:<14}{value['tokens_per_s']:>10.1f}{ratio:>10.2f}{value['steps']:>7.0f}"
            f"{value['ttft_p50_s']:>8.2f} s{value['ttft_p95_s']:>7.2f} s{value['overhead']:>10.1%}"
        )
    reference = base[0]["outputs"]
    same = sum(s["outputs"][i] == row for samples in runs.values() for s in samples for i, row in enumerate(reference))
    print(f"\noutputs equal to the first static run's: {same} of {len(reference) * len(modes) * args.repetitions}")
    if args.json:
        settings = {name: getattr(args, name) for name in ("shape", "requests", "threads", "repetitions", "seed")}
        slim = {name: [{k: v for k, v in s.items() if k != "outputs"} for s in rows] for name, rows in runs.items()}
        args.json.write_text(json.dumps({"machine": about, "settings": settings, "results": slim}, indent=1) + "\n")


if __name__ == "__main__":
    main()
