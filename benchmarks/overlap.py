"""What is left of the host's work a step when it overlaps with the device's: a toy device with a fixed step time.

    python benchmarks/overlap.py --json benchmarks/results/overlap.json

The device takes `--step-ms` for any step, one after the other, and costs the host nothing: waiting for it is a sleep.
`plain` executes steps and samples on the host; `in turn` lets the device sample, one step in flight; `ahead` is what
EngineCore does, with two. `overhead` is the time a step takes over the bare device's; `host` is the host's work a step,
measured on a device that takes no time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray

import llmlab as ll
from llmlab.runtime import inflight
from llmlab.runtime.batch import EngineLimits, SamplingBatch, StepBatch, StepResult
from llmlab.runtime.core import EngineCore
from llmlab.runtime.request import Request

MODES = ("plain", "in turn", "ahead")
WARM_UP = 20
"""Steps before the clock starts."""


class PlainDevice:
    """Executes a step in a fixed time; all logits are the same."""

    def __init__(self, step_s: float, vocab: int, num_seqs: int) -> None:
        self.limits = EngineLimits(vocab, max_seq_len=4096, max_tokens_per_step=4096, num_blocks=16384, block_size=16)
        self.step_s = step_s
        self._logits = np.zeros((num_seqs, vocab), np.float32)

    def execute(self, batch: StepBatch) -> NDArray[np.float32]:
        time.sleep(self.step_s)
        return self._logits[: len(batch.logits_index)]

    def release(self, blocks: Any) -> None: ...

    def close(self) -> None: ...


class Device(PlainDevice):
    """Also takes steps ahead, and begins each when the one before it is over."""

    def __init__(self, step_s: float, vocab: int, num_seqs: int) -> None:
        super().__init__(step_s, vocab, num_seqs)
        self._free_at = 0.0
        self._tokens = np.ones(num_seqs, np.int32)

    def submit(self, batch: StepBatch, sampling: SamplingBatch) -> Step:
        self._free_at = max(self._free_at, time.perf_counter()) + self.step_s
        return Step(self._free_at, StepResult(self._tokens[: len(batch.logits_index)], self._logits[:0]))


class Step:
    def __init__(self, done_at: float, outcome: StepResult) -> None:
        self._done_at, self._outcome = done_at, outcome

    def result(self) -> StepResult:
        left = self._done_at - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return self._outcome


def measure(mode: str, num_seqs: int, args: argparse.Namespace, step_s: float) -> float:
    """Seconds a step of decodes."""
    device = (PlainDevice if mode == "plain" else Device)(step_s, args.vocab, num_seqs)
    inflight.MOST_IN_FLIGHT = 1 if mode == "in turn" else 2
    core = EngineCore(device, max_num_seqs=num_seqs, max_tokens_per_step=4096)
    params = ll.SamplingParams(max_tokens=4000, temperature=args.temperature, seed=1)
    for index in range(num_seqs):
        core.add(Request(str(index), [1] * 16, params))
    ends = []
    for _ in range(WARM_UP + args.steps):
        if len(core.step()) != num_seqs:
            raise RuntimeError("a step brought too few tokens")
        ends.append(time.perf_counter())
    core.check_integrity()
    return (ends[-1] - ends[WARM_UP]) / (args.steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all samples")
    args = parser.parse_args()

    about, rows = machine.describe(), []
    print(machine.summary(about))
    print(f"a device with {args.step_ms:g} ms a step, temperature {args.temperature:g}; median of {args.repetitions}\n")
    print(f"{'sequences':>9}  {'mode':<8}{'ms/step':>9}{'overhead':>10}{'host':>10}")
    for num_seqs in args.sequences:
        samples: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        for _ in range(args.repetitions):
            for mode in MODES:
                step_s = args.step_ms / 1e3
                samples[mode].append((measure(mode, num_seqs, args, step_s), measure(mode, num_seqs, args, 0.0)))
        for mode, pairs in samples.items():
            step_ms, host_us = median(p[0] for p in pairs) * 1e3, median(p[1] for p in pairs) * 1e6
            print(f"{num_seqs:>9}  {mode:<8}{step_ms:>9.3f}{step_ms / args.step_ms - 1:>10.1%}{host_us:>7.0f} µs")
            rows.append({"sequences": num_seqs, "mode": mode, "samples": pairs})
    if args.json:
        settings = {k: getattr(args, k) for k in ("step_ms", "steps", "vocab", "temperature", "repetitions")}
        args.json.write_text(json.dumps({"machine": about, "settings": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
