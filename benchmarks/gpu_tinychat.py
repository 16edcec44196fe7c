"""tinychat on an NVIDIA GPU: is the TensorRT engine right, and does it stay so under traffic?

    python benchmarks/gpu_tinychat.py prepare FOLDER [--capability 9.0] [--quantize kv_int8]  # anywhere: torch, onnxruntime, triton
    python benchmarks/gpu_tinychat.py kernels FOLDER                         # its kernels again, with this llmlab
    python benchmarks/gpu_tinychat.py run FOLDER [--json FILE]               # on the GPU: TensorRT, cuda-bindings

`prepare` puts into FOLDER what the machine with the GPU may lack the means to make: the serving graph, the compiled kernels,
the logits of the ONNX Runtime fp32 engine (of the quantized graph, with --quantize) and its exact match on held-out prompts. `run` builds an fp16 engine there and
compares: logits of ragged, chunked and preempted steps (bound: 2e-2 of the largest logit; a step whose positions are shifted
must exceed it. Where activations or the KV cache
are rounded, others of their numbers round up in fp16 than in fp32: there the mean error of a step must be less than half of the shifted one's), exact match on the same prompts (within 0.5 points), then requests that come at random and are cancelled at
random (every block given back, no memory growth). Exits with 1 if any of these fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import llmlab as ll
from llmlab.kernels.binaries import KernelSet
from llmlab.quant.recipe import Recipe
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.core import EngineCore
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request
from llmlab.text.tokenizer import Tokenizer
from llmlab.zoo.score import engine_answerer, grade
from llmlab.zoo.tasks import examples

BOUND, POINTS = 2e-2, 0.5
GRAIN = 2 << 20  # bytes in which the driver hands out memory
BLOCK_SIZE, SEQUENCES, TOKENS = 16, 10, 48
CONFIG: dict[str, Any] = {
    "max_batch": 64,
    "max_tokens_per_step": 512,
    "max_seq_len": 1024,
    "decode_buckets": (1, 64),
    "block_size": BLOCK_SIZE,
}


def prepare(folder: Path, count: int, recipe: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    graph = ll.optimize(ll.export("tinychat"))
    if recipe is not None:
        graph = ll.quantize(graph, recipe, "tinychat")
    graph.save(folder / "graph", overwrite=True)
    with tempfile.TemporaryDirectory() as work:
        engine = ll.build(graph, Path(work) / "engine", max_tokens_per_step=TOKENS, accuracy_level=1)
        backend = engine.backend(max_num_seqs=1)
        tokens = prompts(engine.path, SEQUENCES, TOKENS)
        logits = [backend.execute(alone(t)).copy() for t in tokens]
        backend.close()
        chats = examples("held-out", count, seed=0)
        replies = engine_answerer(engine.path)([example.messages for example in chats])
    np.savez_compressed(folder / "reference.npz", *logits)
    facts = {"count": count, "right": grade(chats, replies)[-1].right, "replies": replies}
    (folder / "reference.json").write_text(json.dumps(facts))
    print(f"{folder}: graph, kernels, logits of {SEQUENCES} sequences, {facts['right']} of {count} right")


def compile_kernels(folder: Path, capability: tuple[int, int]) -> None:
    from llmlab.build_tensorrt import kernels_for

    made = kernels_for(ll.Graph.load(folder / "graph"), ll.BuildConfig(**CONFIG, compute_capabilities=(capability,)))
    shutil.rmtree(folder / "kernels", ignore_errors=True)
    (folder / "kernels").mkdir()
    made.write(folder / "kernels")


def prompts(folder: Path, count: int, longest: int) -> list[np.ndarray]:
    """Token ids of held-out chats, of lengths from 1 to `longest`."""
    tokenizer = Tokenizer(folder)
    asked = examples("held-out", count, seed=5)
    ids = [np.array(tokenizer.encode_chat(example.messages, {})[1]) for example in asked]
    lengths = np.linspace(1, longest, count).astype(int)
    lengths[count // 2] = 2 * BLOCK_SIZE  # whole blocks, too
    return [np.resize(i, n) for i, n in zip(ids, lengths, strict=True)]


def alone(tokens: np.ndarray) -> StepBatch:
    """All of one sequence in one step, logits of every row."""
    n = len(tokens)
    ends = np.array([0, n], np.int32)
    return StepBatch(tokens, np.arange(n), ends, ends[1:], np.zeros((1, 1), np.int32), np.arange(n))


def ragged(tokens: list[np.ndarray], table: np.ndarray, seed: int = 0) -> list[tuple[StepBatch, list[tuple[int, int]]]]:
    """Steps in which every sequence takes a chunk, one token or none, and each row's (sequence, token). The longest loses its
    place half-way and starts over in other blocks."""
    rng = np.random.default_rng(seed)
    done, lost, result, table = [0] * len(tokens), False, [], table.copy()
    while any(d < len(t) for d, t in zip(done, tokens, strict=True)):
        if not lost and done[-1] > len(tokens[-1]) // 2:
            used = table[-1] >= 0
            lost, done[-1], table[-1, used] = True, 0, table[-1, used][::-1]
        left = [len(t) - d for d, t in zip(done, tokens, strict=True)]
        most = 1 if rng.random() < 0.6 else 17  # decode steps, and mixed ones
        takes = [(b, int(rng.integers(1, min(n, most) + 1))) for b, n in enumerate(left) if n and rng.random() < 0.8]
        if not takes:
            continue
        rows = [(b, done[b] + i) for b, n in takes for i in range(n)]
        for b, n in takes:
            done[b] += n
        batch = StepBatch(
            input_ids=np.array([tokens[b][i] for b, i in rows]),
            position_ids=np.array([i for _, i in rows]),
            query_start=np.cumsum([0, *(n for _, n in takes)]).astype(np.int32),
            kv_len=np.array([done[b] for b, _ in takes], np.int32),
            block_table=table[[b for b, _ in takes]],
            logits_index=np.arange(len(rows)),
        )
        result.append((batch, rows))
    return result


def check_logits(engine: ll.Engine, reference: list[np.ndarray]) -> dict[str, Any]:
    recipe = Recipe.parse(engine.manifest.recipe) if engine.manifest.recipe else Recipe()
    rounds = recipe.activations is not None or recipe.kv_cache is not None
    backend = engine.backend(max_num_seqs=64)
    tokens = prompts(engine.path, SEQUENCES, TOKENS)
    width = backend.limits.max_blocks_per_seq
    used = -(-TOKENS // BLOCK_SIZE)
    table = np.full((SEQUENCES, width), -1, np.int32)
    table[:, :used] = (
        np.random.default_rng(1).permutation(backend.limits.num_blocks)[: SEQUENCES * used].reshape(-1, used)
    )
    largest = max(float(np.abs(r).max()) for r in reference)
    worst = top = rows = 0.0
    kinds = {"decode": 0, "mixed": 0}
    steps = ragged(tokens, table)

    def error(batch: StepBatch, places: list[tuple[int, int]]) -> tuple[float, float, float]:
        """The largest, the mean, and how many rows have the same top token."""
        logits, want = backend.execute(batch), np.array([reference[b][i] for b, i in places])
        off = np.abs(logits - want)
        return float(off.max()), float(off.mean()), float((logits.argmax(1) == want.argmax(1)).sum())

    for _ in range(3):  # what was captured the first time is replayed
        for batch, places in steps:
            step_error, _, same = error(batch, places)
            worst, top, rows = max(worst, step_error), top + same, rows + len(places)
            kinds["decode" if len(batch.input_ids) == len(batch.kv_len) else "mixed"] += 1
    batch, places = next(step for step in reversed(steps) if (step[0].kv_len > 20).any())
    _, mean, _ = error(batch, places)
    shifted = replace(batch, kv_len=np.maximum(batch.kv_len - 1, np.diff(batch.query_start)))
    control, control_mean, _ = error(shifted, places)
    profile = [backend.profile(batch, 200) for batch in (1, 64)]
    backend.close()
    return {
        "relative_error": worst / largest,
        "absolute_error": worst,
        "largest_logit": largest,
        "same_top_token": top / rows,
        "steps": kinds,
        "control_relative_error": control / largest,
        "mean_error": mean / largest,
        "control_mean_error": control_mean / largest,
        "decode_step_ms": {str(p.shape.batch): p.step_ms for p in profile},
        "eager_step_ms": {str(p.shape.batch): p.eager_ms for p in profile},
        "parts_ms": [{"name": s.name, "kind": s.kind, "ms": round(s.ms, 4)} for s in profile[-1].steps],
        "passed": 2 * mean < control_mean if rounds else worst / largest <= BOUND < control / largest,
    }


def check_score(engine: ll.Engine, facts: dict[str, Any]) -> dict[str, Any]:
    chats = examples("held-out", facts["count"], seed=0)
    start = time.perf_counter()
    replies = engine_answerer(engine.path)([example.messages for example in chats])
    seconds = time.perf_counter() - start
    right = grade(chats, replies)[-1].right
    points = 100 * (right - facts["right"]) / facts["count"]
    same = sum(a == b for a, b in zip(replies, facts["replies"], strict=True))
    return {
        "prompts": facts["count"],
        "right": right,
        "right_onnxruntime": facts["right"],
        "points": points,
        "same_replies": same,
        "seconds": seconds,
        "passed": abs(points) <= POINTS,
    }


def check_traffic(engine: ll.Engine, count: int) -> dict[str, Any]:
    """Requests that come at random, a tenth of them cancelled at random, on a pool too small for all of them at once."""
    rng = np.random.default_rng(2)
    backend = engine.backend(max_num_seqs=64, kv_blocks=100)
    core = EngineCore(
        backend,
        max_num_seqs=64,
        max_tokens_per_step=512,
        eos_token_ids=engine.manifest.eos_token_ids,
        prefix_cache=True,
    )
    tokens = [tuple(int(i) for i in t) for t in prompts(engine.path, 64, 90)]
    sent, checks = 0, 0
    live: set[str] = set()
    reasons: Counter[str] = Counter()
    memory: list[tuple[int, int]] = []
    start = time.perf_counter()
    while sent < count or core.has_work:
        for _ in range(int(rng.integers(0, 8))):
            if sent < count and len(live) < 200:
                params = SamplingParams(
                    max_tokens=int(rng.integers(1, 120)),
                    temperature=float(rng.random() < 0.5),
                    seed=sent,
                    ignore_eos=bool(rng.random() < 0.7),  # so that blocks run out
                )
                core.add(Request(f"r{sent}", tokens[int(rng.integers(len(tokens)))], params, 0.0))
                live.add(f"r{sent}")
                sent += 1
        if live and rng.random() < 0.2:
            core.cancel(sorted(live)[int(rng.integers(len(live)))])
        for update in core.step():
            if update.finish_reason is not None:
                reasons[update.finish_reason] += 1
                live.discard(update.request_id)
        checks += 1
        if checks % 20 == 0 or not core.has_work:
            core.check_integrity()
            memory.append((backend.device.free_memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    core.check_integrity()
    seconds = time.perf_counter() - start
    backend.close()
    half = len(memory) // 2
    gpu_growth, host_growth = memory[half][0] - memory[-1][0], memory[-1][1] - memory[half][1]
    return {
        "requests": sent,
        "finished": reasons,
        "steps": checks,
        "preemptions": core.stats.total.preemptions,
        "seconds": seconds,
        "gpu_bytes_grown_in_second_half": gpu_growth,
        "host_kib_grown_in_second_half": host_growth,
        "passed": sum(reasons.values()) == sent
        and not reasons["error"]
        and core.stats.total.preemptions > 0
        and gpu_growth <= GRAIN
        and host_growth < 20_000,
    }


def run(folder: Path, count: int, out: Path | None, work: Path) -> bool:
    graph = ll.Graph.load(folder / "graph")
    start = time.perf_counter()
    engine = ll.build(
        graph,
        work / "engine",
        target="tensorrt",
        config=ll.BuildConfig(**CONFIG),
        kernels=KernelSet.read(folder / "kernels"),
        overwrite=True,
    )
    found: dict[str, Any] = {"build_s": time.perf_counter() - start, "engine": engine.to_dict()["compiled"]}
    print(f"built in {found['build_s']:.1f} s: {engine}", flush=True)
    with np.load(folder / "reference.npz") as arrays:
        reference = [arrays[name] for name in arrays.files]
    facts = json.loads((folder / "reference.json").read_text())
    checks = {
        "logits": lambda: check_logits(engine, reference),
        "score": lambda: check_score(engine, facts),
        "traffic": lambda: check_traffic(engine, count),
    }
    passed = True
    for name, check in checks.items():
        found[name] = check()
        passed &= found[name]["passed"]
        print(name, json.dumps({k: v for k, v in found[name].items() if k != "parts_ms"}), flush=True)
        if out is not None:
            out.write_text(json.dumps({"machine": describe(), "passed": passed, **found}, indent=1) + "\n")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "kernels", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--quantize", help="a recipe, for prepare")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="where the engine is built; default: a temporary folder")
    given = parser.parse_args()
    if given.what == "prepare":
        prepare(given.folder, given.prompts, given.quantize)
    if given.what in ("prepare", "kernels"):
        major, minor = given.capability.split(".")
        compile_kernels(given.folder, (int(major), int(minor)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return 0 if run(given.folder, given.requests, given.json, given.work or Path(temporary)) else 1


if __name__ == "__main__":
    sys.exit(main())
