"""A model of known sizes with random weights on an NVIDIA GPU: build time, speed, energy, where a step's time goes.

    python benchmarks/gpu_shape.py prepare FOLDER --shape llama-2-7b [--layers 4] [--capability 9.0]   # anywhere: torch, triton
    python benchmarks/gpu_shape.py run FOLDER [--json FILE]                                            # on the GPU: TensorRT
    python benchmarks/gpu_transformers.py FOLDER [--json FILE]                                         # beside it: torch

`prepare` exports and optimizes a checkpoint whose weights are holes in a file, and compiles the kernels; FOLDER is then a few
MB; `kernels` compiles them again. `run` fills the checkpoint with random weights, unless `weights` did, builds an fp16 engine and measures: `--batch` sequences of 128 tokens in
and 128 out, 256 requests of mixed lengths in flight against static batches (gpu_traffic.py), then a decode step of each batch size, part by
part, beside the time that reading the weights once would take; with `--context` also steps of sequences of so many tokens, up to as many as
the KV pool holds. `--layers` measures a model of fewer layers, whose steps say what one layer costs. A quantized KV cache has scales that
are made up: nothing is calibrated on random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_traffic import fixed, inflight_against_static
from machine import describe

import llmlab as ll
from llmlab.checkpoint import read_safetensors
from llmlab.cuda import Device
from llmlab.cuda.energy import EnergyMeter
from llmlab.kernels.binaries import KernelSet
from llmlab.quant.kv_scales import CACHES, Scales, place_scales
from llmlab.quant.recipe import Recipe
from llmlab.zoo.shapes import sizes_of, tensors, write_checkpoint

BANDWIDTH = 4.3e12
"""Bytes a second that an H200 copies at (benchmarks/gpu_attention.py measures it)."""
STEP = 2048
"""Most tokens in a step: TensorRT times every product of its own at this size, several times over, so more costs minutes."""
STD = 0.02
KV_SCALE = 8 / 127
"""Of int8 keys and values: those of random weights are up to 7 or so. Others in proportion."""


def config(given: argparse.Namespace, seq: int, capability: tuple[int, int] | None = None) -> ll.BuildConfig:
    return ll.BuildConfig(
        max_batch=given.max_batch,
        max_tokens_per_step=STEP,
        max_seq_len=seq,
        decode_buckets=tuple(given.buckets),
        block_size=64,
        products=given.products,
        optimization_level=given.level,
        compute_capabilities=() if capability is None else (capability,),
    )


def prepare(folder: Path, work: Path, given: argparse.Namespace) -> None:
    sizes = sizes_of(given.shape) | ({} if given.layers is None else {"num_hidden_layers": given.layers})
    folder.mkdir(parents=True, exist_ok=True)
    graph = ll.optimize(ll.export(write_checkpoint(work / "checkpoint", sizes, "float16")))
    graph.save(folder / "graph", overwrite=True, copy_weights=False)
    files = {p.name: p.stat().st_mtime_ns for p in (work / "checkpoint").iterdir()}
    facts = {
        "shape": given.shape,
        "sizes": sizes,
        "checkpoint": str(work / "checkpoint"),
        "files": files,
        "seq": given.max_seq_len or 1024,
    }
    (folder / "shape.json").write_text(json.dumps(facts))
    if not given.no_kernels:
        compile_into(folder / "kernels", load(folder, work / "checkpoint", given), given, facts["seq"])


def compile_into(kernels: Path, graph: ll.Graph, given: argparse.Namespace, seq: int) -> None:
    from llmlab.build_tensorrt import kernels_for

    major, minor = map(int, given.capability.split("."))
    made = kernels_for(graph, config(given, seq, (major, minor)))
    shutil.rmtree(kernels, ignore_errors=True)
    kernels.mkdir()
    made.write(kernels)


def compile_again(folder: Path, given: argparse.Namespace) -> None:
    """The kernels of a prepared folder, with this llmlab. A checkpoint of the right sizes is enough: holes, where there is none."""
    facts = json.loads((folder / "shape.json").read_text())
    compile_into(kernels_of(folder, given), load(folder, fill(facts, random=False), given), given, facts["seq"])


def kernels_of(folder: Path, given: argparse.Namespace) -> Path:
    return folder / ("kernels" if given.quantize is None else f"kernels-{given.quantize}")


def load(folder: Path, checkpoint: Path, given: argparse.Namespace) -> ll.Graph:
    """The graph, quantized where that is asked for: by rounding to nearest, when the weights are written."""
    graph = ll.Graph.load(folder / "graph", weights_from=checkpoint)
    if given.quantize is None:
        return graph
    recipe = Recipe.parse(given.quantize)
    products = replace(recipe, kv_cache=None)
    if products.weights is not None:
        graph = ll.quantize(graph, products)
    if recipe.kv_cache is not None:
        dtype = CACHES[recipe.kv_cache.dtype]
        scales = [np.full(layer.kv_heads, KV_SCALE, np.float32) for layer in graph.kv_layers()]
        place_scales(graph, dtype, [Scales(s, s) for s in scales])
    return graph


def fill(facts: dict[str, Any], *, random: bool = True) -> Path:
    """The checkpoint that the graph refers to, made with random weights (or none) unless it is there; its files have the sizes
    and times that they had.

    Matrices are cut out of one block of random numbers: drawing billions takes minutes, and nothing here reads them.
    """
    checkpoint = Path(facts["checkpoint"])
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, facts["sizes"], "float16")
        block = (np.random.default_rng(0).standard_normal((1 << 24) + 12345, np.float32) * np.float32(STD)).astype(
            np.float16
        )
        for name in facts["files"]:
            stored = read_safetensors(checkpoint / name) if random and name.endswith(".safetensors") else {}
            for tensor in stored.values():
                values = np.memmap(checkpoint / name, tensor.dtype, "r+", tensor.offset, tensor.shape).reshape(-1)
                for start in range(0, values.size, block.size):
                    values[start : start + block.size] = block[: values.size - start]
                if len(tensor.shape) == 1:
                    values += np.float16(1)  # a norm's
        for name, then in facts["files"].items():
            os.utime(checkpoint / name, ns=(then, then))
    return checkpoint


def timed(owner: Any, name: str, tell: Callable[[str, float], None], label: Callable[..., str]) -> None:
    """Let the function `name` of `owner` tell how long each call took."""
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments, **options)
        tell(label(*arguments, **options), time.perf_counter() - start)
        return result

    setattr(owner, name, call)


def dissect(backend: Any, batch: int, context: int, weights: int) -> dict[str, Any]:
    profile = backend.profile(batch, context)
    slowest = sorted(profile.steps, key=lambda s: -s.ms)[:12]
    return {
        "batch": batch,
        "context": context,
        "step_ms": profile.step_ms,
        "eager_ms": profile.eager_ms,
        "parts_ms": profile.total("part"),
        "products_ms": profile.total("product"),
        "norms_ms": profile.total("norm"),
        "attention_ms": profile.total("attention"),
        "weights_ms": weights / BANDWIDTH * 1e3,
        "of_bandwidth": weights / BANDWIDTH * 1e3 / profile.step_ms,
        "slowest": [{"name": s.name, "kind": s.kind, "ms": round(s.ms, 4)} for s in slowest],
        "layer_1": [
            {"name": s.name.rpartition("layers.")[2], "kind": s.kind, "ms": round(s.ms, 4)}
            for s in profile.steps
            if "layers.1." in s.name
        ],
    }


def build(folder: Path, checkpoint: Path, work: Path, facts: dict[str, Any], given: argparse.Namespace) -> ll.Engine:
    """With the seconds of each part and of the weights file printed as they come."""
    from llmlab import build_tensorrt
    from llmlab.runtime.manifest import Manifest

    def tell(what: str, seconds: float) -> None:
        print(f"  {seconds:7.1f} s  {what}", flush=True)

    timed(build_tensorrt.PlanBuilder, "build", tell, lambda *_, name, **__: name)
    timed(build_tensorrt, "write_tensors", tell, lambda path, tensors: f"{path.name}, {len(tensors)} tensors")
    timed(Manifest, "write", tell, lambda *_: "hashes")
    return ll.build(
        load(folder, checkpoint, given),
        work / "engine",
        target="tensorrt",
        config=config(given, given.max_seq_len or facts["seq"]),
        kernels=KernelSet.read(kernels_of(folder, given)),
        overwrite=True,
    )


def run(folder: Path, work: Path, given: argparse.Namespace) -> None:
    facts = json.loads((folder / "shape.json").read_text())
    found: dict[str, Any] = {
        "machine": describe(),
        "shape": facts["shape"],
        "quantize": given.quantize,
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
    engine = build(folder, checkpoint, work, facts, given)
    note("build_s", round(time.perf_counter() - start, 1))
    note(
        "engine", {"bytes": engine.size, "level": given.level, "buckets": given.buckets, **engine.to_dict()["compiled"]}
    )
    layers = json.loads((engine.path / "layers.json").read_text())
    note("parts", [[p["name"], p["seconds"]] for p in layers["parts"]])
    device = Device.open()
    before, start = device.free_memory, time.perf_counter()
    backend: Any = engine.backend(max_num_seqs=given.max_batch)
    note("open_s", round(time.perf_counter() - start, 1))
    limits = backend.limits
    kv = {
        "dtype": engine.manifest.kv.dtype,
        "bytes": backend.pool.nbytes,
        "tokens": limits.num_blocks * limits.block_size,
    }
    note("gpu_memory", {"bytes": before - device.free_memory, "kv_pool": kv})
    meter = EnergyMeter(device)
    try:
        note("generate", [fixed(backend, meter, batch, 128, 128, given.repeat) for batch in given.batch])
        embedding = facts["sizes"]["vocab_size"] * facts["sizes"]["hidden_size"]
        weights = 2 * (sum(int(np.prod(s)) for _, s in tensors(facts["sizes"])) - embedding)  # a row of it is read
        for batch in given.batch:
            note(f"step_{batch}", dissect(backend, batch, 192, weights))
        if given.context:
            fitting = min(given.max_batch, kv["tokens"] // given.context)
            for batch in sorted({min(b, fitting) for b in (*given.long_batch, given.max_batch)}):
                note(f"step_long_{batch}", dissect(backend, batch, given.context, weights))
        if given.requests:
            note("mixed", inflight_against_static(backend, given.requests))
    finally:
        backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "weights", "kernels", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--max-seq-len", type=int, help="tokens of a sequence; default: 1024, as prepared")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--no-kernels", action="store_true", help="`prepare` compiles none: `kernels` will")
    parser.add_argument("--level", type=int, help="TensorRT's optimization level")
    parser.add_argument(
        "--buckets", type=int, nargs="*", default=[1, 64], help="decode batches with a profile of their own"
    )
    parser.add_argument("--products", choices=("kernels", "tensorrt"), help="what computes large linear layers")
    parser.add_argument(
        "--quantize",
        help="a recipe that needs no calibration but for the KV cache: int8_dynamic+kv_int8; for `kernels` and `run`",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--context", type=int, help="tokens of the sequences of more decode steps")
    parser.add_argument("--long-batch", type=int, nargs="*", default=[], help="such sequences, beside as many as fit")
    parser.add_argument("--requests", type=int, default=256, help="of mixed lengths; 0: none")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--work", type=Path, help="where checkpoint and engine are written; default: a temporary folder"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        if given.what == "prepare":
            prepare(given.folder, work, given)
        elif given.what == "weights":
            fill(json.loads((given.folder / "shape.json").read_text()))
        elif given.what == "kernels":
            compile_again(given.folder, given)
        else:
            run(given.folder, work, given)


if __name__ == "__main__":
    main()
