"""One layer's attention from kernels compiled ahead of time, beside the same kernels started by Triton's own launcher.

    python benchmarks/aot_attention.py [--json FILE]

Nothing should be lost: the compiled kernels take the number of splits at run time and lie in an engine folder. Milliseconds are medians of
CUDA-graph replays; `layer` adds RoPE and the write of keys and values; `host_us` is what starting one layer costs the CPU without a graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_attention import copy_bandwidth, median_ms, random_step, replay_ms, write
from tables import show

from llmlab.cuda import Device, Graph, Stream
from llmlab.kernels.attention import AttentionPointers, PagedAttention, TokenLocator
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import compile_attention
from llmlab.kernels.gpu import geometry, launch
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant
from llmlab.kernels.loaded import LoadedKernel

KINDS = {"MHA 32": AttentionKind(32, 32, 128, 64), "GQA 32:8": AttentionKind(32, 8, 128, 64)}
DECODE = [(1, 1024), (1, 32768), (8, 1024), (8, 4096), (64, 1024), (64, 4096)]
PREFILL = [(1, 2048), (4, 2048)]
SLICES = 200  # layers started one by one for host_us


def graph_ms(graph: Graph) -> float:
    return median_ms(lambda: graph.launch(torch.cuda.current_stream().cuda_stream))


class Layer:
    """A layer on a random step, its pointers those of torch's tensors."""

    def __init__(
        self, kernels: KernelSet, device: Device, kind: AttentionKind, batch: int, keys: int, new: int
    ) -> None:
        self.variant = AttentionVariant(kind, rotary=kind.head_dim)
        self.kernels, self.device, self.stream = kernels, device, Stream()
        self.step = step = random_step(kind, batch, keys, new)
        tokens, width = batch * new, kind.kv_heads * kind.head_dim
        self.splits = geometry.decode_splits(kind, batch, keys, device.multiprocessors) if new == 1 else 0
        parts = (batch, kind.num_heads, max(1, self.splits))
        make = {"device": "cuda"}
        self.out, self.scratch = torch.full_like(step.q, torch.nan), torch.empty_like(step.q)
        self.tensors: dict[str, Any] = {
            "q": step.q,
            "k": torch.randn(tokens, width, dtype=torch.float16, **make),
            "v": torch.randn(tokens, width, dtype=torch.float16, **make),
            "q_scratch": self.scratch,
            "out": self.out,
            "pool": step.pool,
            "query_start": step.query_start,
            "kv_len": step.kv_len,
            "block_table": step.block_table,
            "position_ids": torch.zeros(tokens, dtype=torch.int32, **make),
            "slots": torch.empty(tokens, dtype=torch.int64, **make),
            "cos": torch.ones(1, kind.head_dim // 2, **make),
            "sin": torch.zeros(1, kind.head_dim // 2, **make),
            "partial": torch.empty(*parts, kind.head_dim, **make),
            "partial_lse": torch.empty(*parts, **make),
        }
        at = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self.pointers = AttentionPointers(**at, q_stride=step.q.stride(0), k_stride=width, v_stride=width)
        self.size = {"tokens": tokens, "batch": batch, "table_stride": step.block_table.stride(0)}
        torch.cuda.synchronize()
        ints = {name: at[name] for name in ("slots", "query_start", "kv_len", "block_table")}
        TokenLocator(kernels, device, kind.block_size).enqueue(self.stream, **ints, **self.size)
        self.layer = PagedAttention(kernels, device, self.variant, step.scale)

    def enqueue(self) -> None:
        shape = {"decode": self.splits > 0, "splits": self.splits, "blocks": self.step.pool.shape[1]}
        self.layer.enqueue(self.stream, self.pointers, **self.size, **shape)

    def attention_alone(self) -> Callable[[], None]:
        """Decode and merge, or prefill: what Triton's launcher is timed with."""
        kind, batch = self.variant.kind, self.size["batch"]
        values = {**vars(self.pointers), **self.size, "scale": self.step.scale, "splits": self.splits}
        values |= {"num_seqs": batch, "pool_half": self.step.pool[0].numel()}
        starts = [("paged_prefill", geometry.prefill(kind, self.size["tokens"], batch, decodes=False))]
        if self.splits:
            starts = [("paged_decode", geometry.decode(kind, batch, self.splits))]
        if self.splits > 1:
            starts.append(("merge_splits", geometry.merge(kind, batch)))
        loaded = [LoadedKernel(self.kernels, self.device, n, self.variant.constants(s)) for n, s in starts]

        def run() -> None:
            for kernel, (_, start) in zip(loaded, starts, strict=True):
                kernel.launch(start.grid, values, self.stream)

        return run

    def row(self, name: str, keys: int) -> dict[str, Any]:
        step, splits = self.step, self.splits
        expected = torch.full_like(self.out, torch.nan)

        def jit() -> None:
            if splits:
                launch.decode(step, step.q, expected, splits)
            else:
                launch.prefill(step, step.q, expected, decodes=False)

        theirs = replay_ms(jit)
        run = self.attention_alone()
        with self.stream.capture() as alone:
            run()
        ours = graph_ms(alone)
        torch.cuda.synchronize()
        difference = float((self.out.float() - expected.float()).norm() / expected.float().norm())
        with self.stream.capture() as whole:
            self.enqueue()
        layer = graph_ms(whole)
        self.stream.synchronize()
        start = time.perf_counter()
        for _ in range(SLICES):
            self.enqueue()
        host = (time.perf_counter() - start) / SLICES * 1e6
        self.stream.synchronize()
        return {
            "heads": name,
            "batch": self.size["batch"],
            "keys": keys,
            "splits": splits,
            "triton_ms": round(theirs, 4),
            "compiled_ms": round(ours, 4),
            "against_triton": round(theirs / ours, 3),
            "layer_ms": round(layer, 4),
            "host_us": round(host, 1),
            "difference": round(difference, 6),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    device = Device.open(torch.cuda.current_device())
    start = time.perf_counter()
    variants = [AttentionVariant(kind, rotary=kind.head_dim) for kind in KINDS.values()]
    kernels = compile_attention(variants, [10 * card.major + card.minor])
    seconds = time.perf_counter() - start
    print(f"{card.name}; {len(kernels.kernels)} kernels compiled in {seconds:.1f} s; fp16, head_dim 128, blocks of 64")
    rows = [
        *(Layer(kernels, device, k, b, n, 1).row(name, n) for name, k in KINDS.items() for b, n in DECODE),
        *(Layer(kernels, device, k, b, n, n).row(name, n) for name, k in KINDS.items() for b, n in PREFILL),
    ]
    show("decode, then whole prompts (splits 0)", rows)
    if given.json is not None:
        compiled = [{"kernels": len(kernels.kernels), "seconds": round(seconds, 1)}]
        write(given.json, "python benchmarks/aot_attention.py", copy_bandwidth(), compiled=compiled, rows=rows)


if __name__ == "__main__":
    main()
