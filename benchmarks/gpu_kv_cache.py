"""Decode attention over int8 and fp8 pools of keys and values, beside fp16, and how many sequences fit into a card's memory.

    python benchmarks/gpu_kv_cache.py [--json FILE] [--forms "MHA 32"]

All three read the same keys, in blocks of 64 tokens that lie in random order; times are medians of CUDA-graph replays with the card's
cache flushed between them. `error` is against float64 attention over the values as they lie in the pool, so it is what the kernel adds to
the pool's own rounding. --forms times other tile sizes, warps and stages of the kernels instead.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_attention import HALF, copy_bandwidth, random_step, replay_ms, write
from tables import show

from llmlab.kernels.gpu import geometry, launch
from llmlab.kernels.gpu.geometry import AttentionKind, Launch
from llmlab.runtime.backends.tensorrt.memory import block_bytes
from llmlab.runtime.manifest import KVLayout

POOLS = {"float16": HALF, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
HEADS = {"MHA 32": (32, 32), "GQA 32:8": (32, 8), "GQA 32:4": (32, 4)}
SHAPES = {
    "MHA 32": [(1, 65536), (8, 8192), (64, 1024), (8, 32768), (64, 4096)],
    "GQA 32:8": [(1, 65536), (8, 8192), (64, 4096), (8, 65536), (64, 16384)],
    "GQA 32:4": [(1, 65536), (8, 32768), (64, 4096), (64, 16384)],
}
FORMS = [(64, 4, 3), (64, 4, 6), (128, 4, 3), (128, 4, 6), (128, 8, 3), (256, 8, 3)]
FORM_SHAPES = {"MHA 32": (8, 8192), "GQA 32:8": (64, 4096), "GQA 32:4": (8, 32768)}
LAYERS, LONG = 32, 4096  # of Llama-2-7B, whose weights take 13.5 GB


def quantized(step: launch.Step, dtype: torch.dtype) -> launch.Step:
    """The same step over a pool of `dtype`, a scale for each head from its largest value."""
    if dtype == HALF:
        return step
    most = 127.0 if dtype == torch.int8 else 448.0
    scales = step.pool.float().abs().amax((1, 3, 4)) / most  # [2, kv_heads]
    values = step.pool / scales[:, None, :, None, None].half()
    pool = (values.round().clamp(-127, 127) if dtype == torch.int8 else values.clamp(-448, 448)).to(dtype)
    kind = replace(step.kind, quantized=True)
    return replace(step, kind=kind, pool=pool, k_scale=scales[0].contiguous(), v_scale=scales[1].contiguous())


def expected(step: launch.Step, sequence: int) -> torch.Tensor:
    """One sequence's attention in float64 [heads, dim], over what lies in the pool."""
    kind, length = step.kind, int(step.kv_len[sequence])
    rows = step.pool[:, step.block_table[sequence].long()].double().transpose(1, 2).flatten(2, 3)[:, :, :length]
    if kind.quantized:
        rows = rows * torch.stack([step.k_scale, step.v_scale]).double()[:, :, None, None]
    keys, values = rows.repeat_interleave(kind.group, 1)  # [heads, keys, dim]
    q = step.q[sequence].reshape(kind.num_heads, 1, kind.head_dim).double()
    return (torch.softmax(q @ keys.mT * step.scale, -1) @ values)[:, 0]


def timed(step: launch.Step, splits: int) -> tuple[float, float]:
    """Milliseconds, and the error of the worst of two sequences."""
    out = torch.full_like(step.q, torch.nan)
    ms = replay_ms(lambda: launch.decode(step, step.q, out, splits))
    errors = []
    for sequence in {0, len(step.kv_len) - 1}:
        wanted = expected(step, sequence)
        found = out[sequence].reshape(wanted.shape).double()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return ms, max(errors)


def decode_rows(name: str, batch: int, keys: int, copy: float, processors: int) -> list[dict[str, Any]]:
    kind = AttentionKind(*HEADS[name], 128, 64)
    splits = geometry.decode_splits(kind, batch, keys, processors)
    step, rows, narrow = random_step(kind, batch, keys, 1), [], 0.0
    for pool, dtype in POOLS.items():
        ms, error = timed(quantized(step, dtype), splits)
        narrow = narrow or ms
        rate = 2 * batch * keys * kind.kv_heads * 128 * dtype.itemsize / ms / 1e9
        rows.append(
            {
                "heads": name,
                "batch": batch,
                "keys": keys,
                "splits": splits,
                "pool": pool,
                "ms": round(ms, 4),
                "tb_per_s": round(rate, 2),
                "of_copy": round(rate / copy, 3),
                "against_fp16": round(narrow / ms, 2),
                "error": round(error, 5),
            }
        )
    return rows


def form_rows(name: str, batch: int, keys: int, processors: int) -> list[dict[str, Any]]:
    """Other forms of the same launch."""
    kind = AttentionKind(*HEADS[name], 128, 64)
    splits = geometry.decode_splits(kind, batch, keys, processors)
    plain, step = geometry.decode, random_step(kind, batch, keys, 1)
    steps = {pool: quantized(step, dtype) for pool, dtype in POOLS.items() if dtype != HALF}

    def in_form(form: tuple[int, int, int], pool: str) -> str:
        tile, warps, stages = form

        def decode(kind: AttentionKind, batch: int, splits: int) -> Launch:
            given = plain(kind, batch, splits)
            options = {"num_warps": warps, "num_stages": stages}
            return Launch({**given.constants, "TILE": tile}, options, given.grid)

        narrow = steps[pool]
        out = torch.empty_like(narrow.q)
        geometry.decode = decode
        try:
            return f"{replay_ms(lambda: launch.decode(narrow, narrow.q, out, splits)):.4f}"
        except Exception as problem:  # no shared memory for it
            return type(problem).__name__
        finally:
            geometry.decode = plain

    return [
        {"heads": name, "batch": batch, "keys": keys, "form": form} | {pool: in_form(form, pool) for pool in steps}
        for form in FORMS
    ]


def fitting() -> list[dict[str, Any]]:
    """Sequences of 4,096 tokens of a Llama-2-7B whose keys and values fit beside its weights."""
    memory = 0.9 * torch.cuda.get_device_properties(0).total_memory - 13.5e9
    rows = []
    for pool in POOLS:
        layout = KVLayout("paged", pool, 64, ((32, 128),) * LAYERS)
        scales = 0 if pool == "float16" else LAYERS * 2 * 32 * 4
        blocks = int((memory - scales) // block_bytes(layout))
        rows.append({"pool": pool, "bytes_per_token": block_bytes(layout) // 64, "sequences": blocks // (LONG // 64)})
    return [{**row, "against_fp16": round(row["sequences"] / rows[0]["sequences"], 3)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--forms", choices=FORM_SHAPES, help="time other tile sizes, warps and stages instead")
    given = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    copy = copy_bandwidth()
    print(
        f"{card.name}, {card.multi_processor_count} multiprocessors; copy {copy:.2f} TB/s; head_dim 128, blocks of 64"
    )
    if given.forms:
        rows = form_rows(given.forms, *FORM_SHAPES[given.forms], card.multi_processor_count)
        show("milliseconds by tile of keys, warps and stages", rows)
        return
    tables: dict[str, list[dict[str, Any]]] = {"fitting": fitting(), "decode": []}
    show(
        f"sequences of {LONG} tokens, {LAYERS} layers of 32 heads, in 90 % of the card less 13.5 GB", tables["fitting"]
    )
    for name, shapes in SHAPES.items():
        for b, n in shapes:
            tables["decode"] += decode_rows(name, b, n, copy, card.multi_processor_count)
        show(f"decode, one new token a sequence, {name}", [row for row in tables["decode"] if row["heads"] == name])
    if given.json is not None:
        write(given.json, "python benchmarks/gpu_kv_cache.py", copy, **tables)


if __name__ == "__main__":
    main()
