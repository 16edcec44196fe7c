"""Quantized KV caches on ONNX Runtime's CPU: what they lose on tinychat, and what they win in memory and at long context.

    python benchmarks/kv_cache.py [--part accuracy|speed] [--shape smollm2-135m] [--threads 2] [--json FILE]

Accuracy: scales from the zoo's calibration split, KL and agreement with the float32 engine on held-out chats. Speed: decode steps of engines
of random int4 weights in the sizes of a known model over caches of random numbers, interleaved, the best of several; `mb` is what
the sequences' caches really take, from the memory that the process gained when they were written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, summary
from tables import show

import llmlab as ll
from llmlab.evaluate.reference import Reference
from llmlab.quant.kv_scales import CACHES, Scales, place_scales
from llmlab.quant.scheme import KVCache
from llmlab.runtime.backends.tensorrt.profile import decode_batch
from llmlab.zoo.shapes import SHAPES, write_checkpoint

KINDS = [KVCache("int8", "tensor"), KVCache("int8", "head"), KVCache("fp8", "tensor"), KVCache("fp8", "head"),
         KVCache("int4", "head"), KVCache("int4", "channel")]  # fmt: skip
CONTEXTS = [(1, 1024), (1, 4096), (8, 2048)]
REPEATS = 12


def accuracy(folder: Path, threads: int | None) -> list[dict[str, Any]]:
    graph = ll.optimize(ll.export("tinychat"))
    wide = ll.build(graph, folder / "float32")
    rows = []
    with Reference(wide, "tinychat", samples=96, threads=threads, progress=False) as reference:
        for kind in KINDS:
            narrow = ll.quantize(graph, {"kv_cache": {"dtype": kind.dtype, "per": kind.per}}, "tinychat")
            engine = ll.build(narrow, folder / f"{kind.dtype}-{kind.per}")
            found = ll.evaluate(engine, reference=reference, threads=threads, costs=False, progress=False).accuracy
            assert found.kl is not None and found.top1 is not None and found.same_answer is not None
            rows.append(
                {
                    "cache": str(kind),
                    "bytes_per_token": engine.manifest.kv.bytes_per_token,
                    "kl": f"{found.kl.value:.2g}",
                    "kl_high": f"{found.kl.high:.2g}",
                    "top1": round(found.top1.value, 4),
                    "same_answer": round(found.same_answer.value, 4),
                    "exact_match": round(found.exact_match["all"].value, 4),
                }
            )
    return rows


def engines(shape: str, folder: Path) -> dict[str, Any]:
    """By cache, with scales that random numbers fit into."""
    wide = ll.optimize(ll.export(write_checkpoint(folder / "checkpoint", SHAPES[shape], "float16", seed=0)))
    graph = ll.quantize(wide, "int4_rtn")
    made = {"float32": ll.build(graph, folder / "float32")}
    for dtype in ("int8", "int4"):
        narrow = graph.copy()
        scales = [Scales(*[np.full(layer.kv_heads, 0.02, np.float32)] * 2) for layer in graph.kv_layers()]
        place_scales(narrow, CACHES[dtype], scales)
        made[dtype] = ll.build(narrow, folder / dtype)
    return made


def resident() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def speed(shape: str, folder: Path, threads: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    made = engines(shape, folder)
    for sequences, context in CONTEXTS:
        times: dict[str, list[float]] = {name: [] for name in made}
        taken, steps = {}, {}
        for name, engine in made.items():
            backend = engine.backend(threads=threads, max_num_seqs=sequences)
            batch = decode_batch(backend.limits, sequences, context)
            backend.execute(batch)
            before, random = resident(), np.random.default_rng(0)
            for layer in backend._pool.layers:
                one = (context, layer.shape[-1])  # the same for all heads, which changes no time
                if layer.dtype == np.float32:
                    layer[..., :context, :] = random.standard_normal(one, np.float32)
                else:
                    layer[..., :context, :] = random.integers(0, 256, one, np.uint8).view(layer.dtype)
            taken[name], steps[name] = (resident() - before) / 1e6, (backend, batch)
        for _ in range(REPEATS):
            for name, (backend, batch) in steps.items():
                began = time.perf_counter()
                backend.execute(batch)
                times[name].append(time.perf_counter() - began)
        fresh = len(rows)
        for name, (backend, _) in steps.items():
            backend.close()
            ms = min(times[name]) * 1e3
            rows.append(
                {
                    "sequences": sequences,
                    "context": context,
                    "cache": name,
                    "bytes_per_token": made[name].manifest.kv.bytes_per_token,
                    "mb": round(taken[name], 1),
                    "step_ms": round(ms, 2),
                    "against_float32": round(min(times["float32"]) * 1e3 / ms, 2),
                }
            )
        show(f"{shape}, int4 weights, a decode step", rows[fresh:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["accuracy", "speed"])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    machine, tables = describe(), {}
    print(summary(machine))
    with tempfile.TemporaryDirectory(prefix="llmlab-kv-") as name:
        folder = Path(name)
        if given.part != "speed":
            tables["accuracy"] = accuracy(folder, given.threads)
            show("tinychat, against its float32 engine", tables["accuracy"])
        if given.part != "accuracy":
            (folder / "speed").mkdir()
            tables["speed"] = speed(given.shape, folder / "speed", given.threads)
    if given.json is not None:
        data = {"command": "python benchmarks/kv_cache.py", "threads": given.threads, "machine": machine, **tables}
        given.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
