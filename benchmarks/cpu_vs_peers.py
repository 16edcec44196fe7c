"""llmlab against transformers and onnxruntime-genai on one checkpoint: fp32, CPU, the same threads for all.

    python benchmarks/cpu_vs_peers.py --cache CACHE --json benchmarks/results/cpu_vs_peers.json

Prefill is one prompt until its first token; decode is the steps after that, at a batch of 1 and of 8. Every repetition
measures each task on all runtimes in turn, so a slow spell of the machine hits all of them; the table shows medians.
A sample during which other processes took more than --foreign of the machine is repeated (and, if that goes on, kept).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
from peers import GENAI, RUNTIMES, Peer
from shapes import checkpoint

from llmlab.zoo.shapes import SHAPES

DEFAULT = ("transformers", "onnxruntime-genai", "onnxruntime-genai-pruned", "llmlab")
TASKS = ("prefill", "decode B=1", "decode B=8")
RETRIES = 2
PAUSE_S = 0.3  # after a turn a thread pool may go on spinning for a while; nobody else should run then


def sample(peer: Peer, task: str, length: int, steps: int, seed: int, vocab: int, foreign: float) -> dict[str, Any]:
    """One measurement, repeated while others take too much of the machine."""
    batch = 8 if task.endswith("8") else 1
    prompts = np.random.default_rng(seed).integers(1, vocab, (batch, length)).tolist()
    for attempt in range(RETRIES + 1):
        time.sleep(PAUSE_S)
        meter = machine.Meter()
        if task == "prefill":
            answer = peer.ask("prefill", prompts=prompts)
        else:
            answer = peer.ask("decode", prompts=prompts, steps=steps)
        answer["foreign"] = meter.foreign_share(answer["cpu_s"])
        if answer["foreign"] is None or answer["foreign"] <= foreign or attempt == RETRIES:
            break
    return answer


def measure(shape: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """{'tokens_per_s': {name: {task: [one a repetition]}}, ...} for one shape."""
    folder = checkpoint(shape, args.cache)
    rates: dict[str, dict[str, list[float]]] = {name: {task: [] for task in TASKS} for name in names}
    foreign: list[float] = []
    idle, same = 0.0, 0
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(name, folder, args.cache, args.threads)) for name in names]
        for repetition in range(args.repetitions + 1):
            for task in TASKS:
                firsts = []
                first = repetition % len(peers)  # who comes first in a round has it a little easier
                for peer in peers[first:] + peers[:first]:
                    vocab = SHAPES[shape]["vocab_size"]
                    answer = sample(peer, task, args.prompt, args.steps, repetition, vocab, args.foreign)
                    firsts.append(answer["first"])
                    if repetition == 0:  # warm-up: caches, allocators, thread pools
                        continue
                    rates[peer.name][task].append(answer["tokens"] / answer["seconds"])
                    foreign.append(answer["foreign"] or 0.0)
                    idle += answer["idle_cpu_s"]
                same += all(first == firsts[0] for first in firsts)
            print(f"\r{shape}: repetition {repetition} of {args.repetitions}", end="", file=sys.stderr)
    print("\r\033[K", end="", file=sys.stderr)
    return {
        "tokens_per_s": rates,
        "first_tokens_agree": f"{same} of {(args.repetitions + 1) * len(TASKS)}",
        "foreign_share_median": round(median(foreign), 3),
        "foreign_share_max": round(max(foreign), 3),
        "idle_cpu_s": round(idle, 2),
    }


def table(shape: str, result: dict[str, Any], ours: str = "llmlab") -> str:
    """Medians with their quartile range, and how many times the peer `ours` is."""
    rates = result["tokens_per_s"]
    own = rates.get(ours)
    lines = [f"{shape + ', tokens/s':<28}" + "".join(f"{task:>24}" for task in TASKS)]
    for name, tasks in rates.items():
        cells = []
        for task in TASKS:
            low, mid, high = np.percentile(tasks[task], (25, 50, 75))
            ratio = f" {ratios(own, tasks, task):5.2f}×" if own and name != ours else ""
            cells.append(f"{mid:.1f} ({low:.0f}–{high:.0f}){ratio}".rjust(24))
        lines.append(f"{name:<28}" + "".join(cells))
    lines.append(
        f"first tokens agree: {result['first_tokens_agree']}; others took {result['foreign_share_median']:.0%} of the "
        f"machine (median), {result['foreign_share_max']:.0%} (worst); waiting runtimes used {result['idle_cpu_s']} s"
    )
    return "\n".join(lines)


def ratios(own: dict[str, list[float]], peer: dict[str, list[float]], task: str) -> float:
    """Median over repetitions of llmlab's speed over the peer's in the same repetition."""
    return median(a / b for a, b in zip(own[task], peer[task], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for checkpoints and engines")
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "smollm2-360m"], choices=SHAPES)
    parser.add_argument("--runtimes", nargs="+", default=list(DEFAULT), choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=64, help="decode steps")
    parser.add_argument("--repetitions", type=int, default=7, help="after one more for warming up")
    parser.add_argument("--foreign", type=float, default=0.05, help="largest share of the machine others may take")
    parser.add_argument("--json", type=Path, help="file for all samples")
    args = parser.parse_args()
    args.cache = args.cache.resolve()

    about = machine.describe(dict([GENAI.split("==")]))
    settings = {name: getattr(args, name) for name in ("threads", "prompt", "steps", "repetitions")}
    print(machine.summary(about))
    print(f"fp32, {args.threads} threads, prompt {args.prompt}, {args.steps} steps; median (quartiles) of", end=" ")
    print(f"{args.repetitions} interleaved repetitions; ×: llmlab's speed over that runtime's\n")
    results = {}
    for shape in args.shapes:
        results[shape] = measure(shape, args.runtimes, args)
        print(table(shape, results[shape]), end="\n\n", flush=True)
    if args.json:
        content = {"machine": about, "settings": settings, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
