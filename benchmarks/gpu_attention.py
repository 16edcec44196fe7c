"""Paged attention on an NVIDIA GPU: decode's bandwidth and prefill's rate, beside torch and the card's own copy.

    python benchmarks/gpu_attention.py [--json FILE]

Decode reads every key and value once, so what it achieves is bytes of KV over time, beside a device-to-device copy of
4 GB in the same run. torch's scaled_dot_product_attention wants contiguous keys: it is timed on keys that lie so already, and
with the gather from the pool that paged keys need first. All times are medians of CUDA-graph replays (prefill: of launches).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import triton
from machine import describe
from tables import show
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llmlab.kernels.gpu import geometry, launch
from llmlab.kernels.gpu.geometry import AttentionKind

HALF = torch.float16
DECODE = [(b, n) for b in (1, 8, 64) for n in (128, 1024, 4096, 32768) if b * n <= 64 * 4096]
HEADS = {"MHA 32": (32, 32), "GQA 32:4": (32, 4)}
PREFILL = [(1, 2048), (4, 2048), (1, 8192)]
PREFILL_HEADS = [(32, 32, 128), (32, 8, 128), (32, 8, 64)]


def median_ms(run: Any) -> float:
    return float(triton.testing.do_bench(run, warmup=20, rep=50, return_mode="median"))


def replay_ms(run: Any) -> float:
    """Milliseconds of `run` without its launches: captured once, replayed."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay)


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy, bytes read and written."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e9


def random_step(kind: AttentionKind, batch: int, keys: int, new: int) -> launch.Step:
    """`batch` sequences of `new` tokens each, at the end of `keys` keys that are in the pool, blocks in random order."""
    blocks = -(-keys // kind.block_size)
    shape = (2, batch * blocks, kind.kv_heads, kind.block_size, kind.head_dim)
    q = torch.randn(batch * new, kind.num_heads * kind.head_dim, device="cuda", dtype=HALF)
    return launch.Step(
        kind=kind,
        scale=kind.head_dim**-0.5,
        q=q,
        k=None,
        v=None,
        pool=torch.randn(shape, device="cuda", dtype=HALF),
        query_start=torch.arange(batch + 1, device="cuda", dtype=torch.int32) * new,
        kv_len=torch.full((batch,), keys, device="cuda", dtype=torch.int32),
        block_table=torch.randperm(batch * blocks, device="cuda").to(torch.int32).reshape(batch, blocks),
        position_ids=None,
    )


def gathered(step: launch.Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, kv_heads, keys, head_dim], contiguous."""
    rows = step.pool[:, step.block_table.long()]  # [2, B, blocks, kv_heads, block_size, head_dim]
    lined = rows.transpose(3, 2).flatten(3, 4)
    return lined[0], lined[1]


def decode_row(name: str, batch: int, keys: int, copy: float, processors: int) -> dict[str, Any]:
    heads, kv_heads = HEADS[name]
    kind = AttentionKind(heads, kv_heads, 128, 64)
    step = random_step(kind, batch, keys, 1)
    out, splits = torch.full_like(step.q, torch.nan), geometry.decode_splits(kind, batch, keys, processors)
    ours = replay_ms(lambda: launch.decode(step, step.q, out, splits))
    q = step.q.reshape(batch, heads, 1, 128)
    k, v = gathered(step)
    theirs = replay_ms(lambda: sdpa(q, k, v, enable_gqa=heads != kv_heads))
    with_gather = replay_ms(lambda: sdpa(q, *gathered(step), enable_gqa=heads != kv_heads))
    expected = sdpa(q, k, v, enable_gqa=heads != kv_heads).reshape(batch, -1).float()
    rate = 4 * batch * keys * kv_heads * 128 / ours / 1e9
    return {
        "heads": name,
        "batch": batch,
        "keys": keys,
        "splits": splits,
        "ms": round(ours, 4),
        "tb_per_s": round(rate, 2),
        "of_copy": round(rate / copy, 3),
        "sdpa_ms": round(theirs, 4),
        "sdpa_over_gathered_ms": round(with_gather, 4),
        "against_sdpa": round(theirs / ours, 2),
        "against_sdpa_over_gathered": round(with_gather / ours, 2),
        "difference": round(float((out.float() - expected).norm() / expected.norm()), 5),
    }


def prefill_row(shape: tuple[int, int, int], batch: int, tokens: int) -> dict[str, Any]:
    heads, kv_heads, dim = shape
    step = random_step(AttentionKind(heads, kv_heads, dim, 64), batch, tokens, tokens)
    out = torch.full_like(step.q, torch.nan)
    ours = median_ms(lambda: launch.prefill(step, step.q, out, decodes=True))
    q = step.q.reshape(batch, tokens, heads, dim).transpose(1, 2)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in gathered(step))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = median_ms(lambda: sdpa(q, k, v, is_causal=True))
        expected = sdpa(q, k, v, is_causal=True).transpose(1, 2).reshape(batch * tokens, -1).float()
    flops = 2 * batch * heads * dim * tokens * tokens  # two products, half of them masked
    return {
        "heads": f"{heads}:{kv_heads}",
        "head_dim": dim,
        "batch": batch,
        "tokens": tokens,
        "ms": round(ours, 3),
        "tflop_per_s": round(flops / ours / 1e9),
        "flash_tflop_per_s": round(flops / theirs / 1e9),
        "against_flash": round(theirs / ours, 2),
        "difference": round(float((out.float() - expected).norm() / expected.norm()), 5),
    }


def write(path: Path, command: str, copy: float, **tables: list[dict[str, Any]]) -> None:
    """The numbers and what they were measured on, as JSON; `copy` in TB/s."""
    about = {
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(copy, 2),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    data = {"command": command, "machine": describe() | about, **tables}
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    copy = copy_bandwidth()
    print(
        f"{card.name}, {card.multi_processor_count} multiprocessors; copy {copy:.2f} TB/s; fp16, head_dim 128, blocks of 64"
    )
    decode = [decode_row(name, b, n, copy, card.multi_processor_count) for name in HEADS for b, n in DECODE]
    show("decode, one new token a sequence", decode)
    prefill = [prefill_row(shape, b, n) for shape in PREFILL_HEADS for b, n in PREFILL]
    show("prefill, whole prompts", prefill)
    if given.json is not None:
        write(given.json, "python benchmarks/gpu_attention.py", copy, decode=decode, prefill=prefill)


if __name__ == "__main__":
    main()
