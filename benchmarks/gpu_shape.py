"""A model of known sizes with random weights on an NVIDIA GPU: build time, speed, where a step's time goes.

    python benchmarks/gpu_shape.py prepare FOLDER --shape llama-2-7b [--layers 4] [--capability 9.0]   # anywhere: torch, triton
    python benchmarks/gpu_shape.py run FOLDER [--json FILE]                                            # on the GPU: TensorRT

`prepare` exports and optimizes a checkpoint whose weights are holes in a file, and compiles the kernels; FOLDER is then a few
MB. `run` fills the checkpoint with random weights, builds an fp16 engine and measures: `--batch` sequences of 128 tokens in
and 128 out, then a decode step of each batch size, part by part, beside the time that reading the weights once would take.
`--layers` measures a model of fewer layers, whose steps say what one layer costs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import llmlab as ll
from llmlab.kernels.binaries import KernelSet
from llmlab.speed import measure
from llmlab.zoo.shapes import sizes_of, tensors, write_checkpoint

BANDWIDTH = 4.3e12
"""Bytes a second that an H200 copies at (benchmarks/gpu_attention.py measures it)."""
STEP = 2048
"""Most tokens in a step: TensorRT times every product at this size, several times over, so more costs minutes of building."""


def config(buckets: tuple[int, ...], level: int, seq: int, capability: tuple[int, int] | None = None) -> ll.BuildConfig:
    return ll.BuildConfig(
        max_batch=64,
        max_tokens_per_step=STEP,
        max_seq_len=seq,
        decode_buckets=buckets,
        block_size=64,
        optimization_level=level,
        compute_capabilities=() if capability is None else (capability,),
    )


def prepare(folder: Path, work: Path, shape: str, layers: int | None, capability: tuple[int, int], seq: int) -> None:
    from llmlab.build_tensorrt import kernels_for

    sizes = sizes_of(shape) | ({} if layers is None else {"num_hidden_layers": layers})
    folder.mkdir(parents=True, exist_ok=True)
    graph = ll.optimize(ll.export(write_checkpoint(work / "checkpoint", sizes, "float16")))
    graph.save(folder / "graph", overwrite=True, copy_weights=False)
    (folder / "kernels").mkdir(exist_ok=True)
    kernels_for(graph, config((1,), 1, seq, capability)).write(folder / "kernels")
    files = {p.name: p.stat().st_mtime_ns for p in (work / "checkpoint").iterdir()}
    facts = {"shape": shape, "sizes": sizes, "checkpoint": str(work / "checkpoint"), "files": files, "seq": seq}
    (folder / "shape.json").write_text(json.dumps(facts))


def fill(facts: dict[str, Any]) -> Path:
    """The checkpoint that the graph refers to, now with random weights; its files have the sizes and times that they had."""
    checkpoint = Path(facts["checkpoint"])
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, facts["sizes"], "float16", seed=0)
        for name, then in facts["files"].items():
            os.utime(checkpoint / name, ns=(then, then))
    return checkpoint


def dissect(backend: Any, batch: int, context: int, weights: int) -> dict[str, Any]:
    profile = backend.profile(batch, context)
    slowest = sorted(profile.steps, key=lambda s: -s.ms)[:6]
    return {
        "batch": batch,
        "context": context,
        "step_ms": profile.step_ms,
        "eager_ms": profile.eager_ms,
        "parts_ms": profile.total("part"),
        "attention_ms": profile.total("attention"),
        "weights_ms": weights / BANDWIDTH * 1e3,
        "of_bandwidth": weights / BANDWIDTH * 1e3 / profile.step_ms,
        "slowest": [{"name": s.name, "ms": round(s.ms, 4)} for s in slowest],
    }


def run(folder: Path, work: Path, given: argparse.Namespace) -> None:
    facts = json.loads((folder / "shape.json").read_text())
    found: dict[str, Any] = {
        "machine": describe(),
        "shape": facts["shape"],
        "layers": facts["sizes"]["num_hidden_layers"],
    }

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(name, json.dumps(value), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n")

    start = time.perf_counter()
    checkpoint = fill(facts)
    note("weights_s", round(time.perf_counter() - start, 1))
    start = time.perf_counter()
    engine = ll.build(
        ll.Graph.load(folder / "graph", weights_from=checkpoint),
        work / "engine",
        target="tensorrt",
        config=config(tuple(given.buckets), given.level, facts["seq"]),
        kernels=KernelSet.read(folder / "kernels"),
        overwrite=True,
    )
    note("build_s", round(time.perf_counter() - start, 1))
    note(
        "engine", {"bytes": engine.size, "level": given.level, "buckets": given.buckets, **engine.to_dict()["compiled"]}
    )
    layers = json.loads((engine.path / "layers.json").read_text())
    note("parts", [[p["name"], p["seconds"]] for p in layers["parts"]])
    start = time.perf_counter()
    backend = engine.backend(max_num_seqs=64)
    note("open_s", round(time.perf_counter() - start, 1))
    try:
        embedding = facts["sizes"]["vocab_size"] * facts["sizes"]["hidden_size"]
        weights = 2 * (sum(int(np.prod(s)) for _, s in tensors(facts["sizes"])) - embedding)  # a row of it is read
        for batch in given.batch:
            note(f"step_{batch}", dissect(backend, batch, 192, weights))
    finally:
        backend.close()
    rows = measure(engine.path, given.batch, prompt_len=128, output_len=128, repeat=1, threads=None)
    note("generate", [asdict(row) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--level", type=int, default=1, help="TensorRT's optimization level")
    parser.add_argument(
        "--buckets", type=int, nargs="*", default=[1, 64], help="decode batches with a profile of their own"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--work", type=Path, help="where checkpoint and engine are written; default: a temporary folder"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        if given.what == "prepare":
            major, minor = map(int, given.capability.split("."))
            prepare(given.folder, work, given.shape, given.layers, (major, minor), given.max_seq_len)
        else:
            run(given.folder, work, given)


if __name__ == "__main__":
    main()
