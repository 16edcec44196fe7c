"""What it costs to export and build a model: seconds and peak memory, each job in a process of its own.

    python benchmarks/export_cost.py --cache CACHE --json benchmarks/results/export_cost.json

`7b` exports and optimizes a checkpoint of Llama-2-7B's sizes, whose weights are holes in a file. `1.1b` exports, optimizes
and builds a checkpoint of TinyLlama's sizes with random weights for ONNX Runtime and opens the engine; `torch` loads the same
checkpoint as people do (from_pretrained, float32), exports it with torch.onnx.export(dynamo=True) and saves it.
Memory is sampled from the operating system while the job runs: `anonymous` is what the process itself allocated, `peak` has the
pages of mapped files as well, which the system may take back at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

from llmlab.zoo.shapes import SHAPES, tensors, write_checkpoint

_SAMPLE_S = 0.02


class Memory:
    """Peaks of this process's memory since it was made, in bytes, sampled in a thread."""

    def __init__(self) -> None:
        self.peaks = {"peak": 0, "anonymous": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.sample()
            time.sleep(_SAMPLE_S)

    def sample(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}
        for name, field in (("peak", "VmRSS"), ("anonymous", "RssAnon")):
            self.peaks[name] = max(self.peaks[name], sizes[field])


def ours(checkpoint: Path, scratch: Path, *, through: str) -> dict[str, float]:
    """Seconds of each step on the road from `checkpoint` up to `through`: optimize, build or open."""
    import llmlab as ll

    seconds = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        return result

    plain = timed("export", lambda: ll.export(checkpoint))
    serving = timed("optimize", lambda: ll.optimize(plain))
    if through in ("build", "open"):
        engine = timed("build", lambda: ll.build(serving, scratch / "engine"))
    if through == "open":
        timed("open", lambda: engine.backend(threads=None, max_num_seqs=1))
    return seconds


def theirs(checkpoint: Path, scratch: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    loaded = time.perf_counter()
    ids = torch.zeros(2, 7, dtype=torch.long)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=2047)
    shapes = {"input_ids": {0: batch, 1: sequence}, "use_cache": None}
    inputs = {"input_ids": ids, "use_cache": False}
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    exported = time.perf_counter()
    program.save(str(scratch / "model.onnx"), external_data=True)
    return {"load": loaded - began, "export": exported - loaded, "save": time.perf_counter() - exported}


JOBS: dict[str, tuple[str, int | None, Callable[[Path, Path], dict[str, float]]]] = {
    "7b": ("llama-2-7b", None, lambda checkpoint, scratch: ours(checkpoint, scratch, through="optimize")),
    "1.1b": ("tinyllama-1.1b", 0, lambda checkpoint, scratch: ours(checkpoint, scratch, through="open")),
    "torch": ("tinyllama-1.1b", 0, theirs),
    "tiny": ("tiny", 0, lambda checkpoint, scratch: ours(checkpoint, scratch, through="open")),
}
"""Shape, seed of the weights (None: holes) and what is done with the checkpoint."""


def measure(job: str, checkpoint: Path, scratch: Path) -> dict[str, Any]:
    memory = Memory()
    meter, cpu = machine.Meter(), time.process_time()
    seconds = JOBS[job][2](checkpoint, scratch)
    memory.sample()
    own = time.process_time() - cpu
    return {"seconds": seconds, **memory.peaks, "cpu_s": own, "foreign": meter.foreign_share(own)}


def run(job: str, checkpoint: Path, cache: Path) -> dict[str, Any]:
    """The job in a fresh process; what it writes is removed."""
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, __file__, "--cache", str(cache), "--job", job, str(checkpoint), scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for checkpoints and engines")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["7b", "1.1b", "torch"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="that weights are stored in")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, checkpoint, scratch = args.job
        print(json.dumps(measure(name, Path(checkpoint), Path(scratch))))
        return

    cache = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    about, rows = machine.describe(), []
    print(machine.summary(about) + "\n")
    print(
        f"{'job':<7}{'stored as':<11}{'seconds':>9}{'CPU s':>8}{'peak':>10}{'anonymous':>11}{'/ weights':>11}  steps, others' share"
    )
    for job in args.jobs:
        shape, seed, _ = JOBS[job]
        weights = 4 * sum(math.prod(dims) for _, dims in tensors(SHAPES[shape]))
        for dtype in args.dtypes:
            checkpoint = cache / f"{shape}-{dtype}-{seed}"
            if not checkpoint.exists():
                write_checkpoint(checkpoint, SHAPES[shape], dtype, seed=seed)
            row = {"job": job, "dtype": dtype, "float32_weights": weights, **run(job, checkpoint, cache)}
            rows.append(row)
            steps = ", ".join(f"{name} {value:.1f}" for name, value in row["seconds"].items())
            total, foreign = sum(row["seconds"].values()), row["foreign"]
            print(
                f"{job:<7}{dtype:<11}{total:>9.1f}{row['cpu_s']:>8.1f}{row['peak'] / 1e9:>7.2f} GB{row['anonymous'] / 1e9:>8.2f} GB"
                f"{row['peak'] / weights:>11.2f}  {steps}, {'?' if foreign is None else f'{foreign:.0%}'}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
