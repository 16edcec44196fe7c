"""A layer's attention on raw device pointers, from kernels that were compiled ahead of time: no torch, no triton.

Shared by whoever hosts it: the piecewise executor and the TensorRT plugin. Once a step `TokenLocator.enqueue`, then for each layer
`PagedAttention.enqueue`. Both only launch: they neither allocate nor wait, so they can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, SupportsInt

from llmlab.cuda import Device, fill_async
from llmlab.errors import EngineError
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.gpu import geometry
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant, Launch
from llmlab.kernels.loaded import LoadedKernel

_SLOT_BYTES = 8


@dataclass
class AttentionPointers:
    """Device addresses of what one layer reads and writes. 0 for what it doesn't have.

    q, k, v: the new tokens' rows, before RoPE, `*_stride` elements apart: views of one packed product have its width.
    q_scratch, out: [T, num_heads · head_dim], contiguous. pool: [2, blocks, kv_heads, block_size, head_dim].
    query_start [B+1], kv_len [B], block_table [B, table_stride], position_ids [T]: int32, as in the serving graph.
    slots: int64 [T], of `TokenLocator`. The tables, sinks and scales are float32; see `kernels/reference.py`.
    partial, partial_lse: float32, see `scratch_bytes`.
    """

    q: int
    k: int
    v: int
    q_stride: int
    k_stride: int
    v_stride: int
    q_scratch: int
    out: int
    pool: int
    query_start: int
    kv_len: int
    block_table: int
    position_ids: int
    slots: int
    cos: int = 0
    sin: int = 0
    alibi_slopes: int = 0
    sinks: int = 0
    k_scale: int = 0
    v_scale: int = 0
    partial: int = 0
    partial_lse: int = 0


class ScratchBytes(NamedTuple):
    """What to allocate once and share between layers, in bytes."""

    q: int
    slots: int
    partial: int
    partial_lse: int


def scratch_bytes(kind: AttentionKind, tokens: int, batch: int, multiprocessors: int) -> ScratchBytes:
    """Scratch for steps of up to `tokens` rows and `batch` sequences whose splits are those of `geometry.decode_splits`."""
    splits = (geometry.decode_splits(kind, b, 1 << 30, multiprocessors) for b in range(1, batch + 1))
    parts = kind.num_heads * max((b * s for b, s in enumerate(splits, 1) if s > 1), default=0)
    return ScratchBytes(
        2 * tokens * kind.num_heads * kind.head_dim, _SLOT_BYTES * tokens, 4 * parts * kind.head_dim, 4 * parts
    )


class TokenLocator:
    """Where each new token's key and value go, once a step for all layers."""

    def __init__(self, kernels: KernelSet, device: Device, block_size: int) -> None:
        self._kernel = LoadedKernel(kernels, device, "locate_tokens", geometry.locate(block_size, 1).constants)
        self._block_size = block_size

    def enqueue(
        self,
        stream: SupportsInt,
        *,
        slots: int,
        query_start: int,
        kv_len: int,
        block_table: int,
        tokens: int,
        batch: int,
        table_stride: int,
    ) -> None:
        """Fill `slots` (int64 [tokens]); rows that no sequence owns get -1."""
        fill_async(slots, 0xFF, _SLOT_BYTES * tokens, stream)
        values = {
            "slots": slots,
            "query_start": query_start,
            "kv_len": kv_len,
            "block_table": block_table,
            "table_stride": table_stride,
        }
        self._kernel.launch(geometry.locate(self._block_size, batch).grid, values, stream)


class PagedAttention:
    """One layer's attention; layers of one variant may share it. Raises EngineError where the engine has no kernels for this GPU."""

    def __init__(self, kernels: KernelSet, device: Device, variant: AttentionVariant, scale: float) -> None:
        self.variant = variant
        self.scale = scale

        def load(name: str, launch: Launch) -> LoadedKernel:
            return LoadedKernel(kernels, device, name, variant.constants(launch))

        kind = variant.kind
        self._write = load("rope_and_write", variant.write(1))
        self._decode = load("paged_decode", geometry.decode(kind, 1, 1))
        self._decode_split = load("paged_decode", geometry.decode(kind, 1, 2))
        self._merge = load("merge_splits", geometry.merge(kind, 1))
        self._plan = lru_cache(maxsize=512)(self._launches)  # working it out costs the host more than the launches
        self._prefill = {
            launch.constants["ROWS"]: load("paged_prefill", launch) for launch in geometry.prefill_launches(kind)
        }

    def enqueue(
        self,
        stream: SupportsInt,
        pointers: AttentionPointers,
        *,
        tokens: int,
        batch: int,
        decode: bool,
        splits: int,
        table_stride: int,
        blocks: int,
    ) -> None:
        """RoPE and the write of keys and values, then attention into `out`.

        tokens, batch: rows and sequences of the step, or of the bucket that it is padded to. Rows from query_start[batch] on belong to no
        sequence: they are neither read nor written. Sequences without new tokens are passed over.
        decode: no sequence has more than one new token. splits: programs that share the keys of a sequence with one new token, at
        most `geometry.MOST_SPLITS`; 0 if there is no such sequence. blocks: of the pool.
        """
        kind, p = self.variant.kind, pointers
        if self._write.aligned and (
            (p.q | p.k | p.v | p.q_scratch | p.out | p.pool | p.cos | p.sin | p.partial) & 15
            or (p.q_stride | p.k_stride | p.v_stride) & 15
        ):
            raise EngineError(
                f"attention needs tensors at multiples of 16 bytes in rows of multiples of 16 elements, given {p}: lay them out so"
            )
        values: dict[str, float] = {
            **vars(p),
            "q_out": p.q_scratch,
            "scale": self.scale,
            "pool_half": blocks * kind.kv_heads * kind.block_size * kind.head_dim,
            "table_stride": table_stride,
            "splits": splits,
            "num_seqs": batch,
        }
        (write, grid), *attend = self._plan(tokens, batch, decode, splits)
        write.launch(grid, values, stream)
        values["q"], values["q_stride"] = p.q_scratch, kind.num_heads * kind.head_dim
        for kernel, grid in attend:
            kernel.launch(grid, values, stream)

    def _launches(
        self, tokens: int, batch: int, decode: bool, splits: int
    ) -> tuple[tuple[LoadedKernel, tuple[int, ...]], ...]:
        """What is launched for a step of this shape: the write, then attention."""
        kind = self.variant.kind
        if splits > geometry.MOST_SPLITS:
            raise ValueError(f"{splits} splits, more than the {geometry.MOST_SPLITS} whose results are merged")
        found = [(self._write, self.variant.write(tokens).grid)]
        if not decode:
            prefill = geometry.prefill(kind, tokens, batch, decodes=False)
            found.append((self._prefill[prefill.constants["ROWS"]], prefill.grid))
        if splits:
            attend = self._decode_split if splits > 1 else self._decode
            found.append((attend, geometry.decode(kind, batch, splits).grid))
        if splits > 1:
            found.append((self._merge, geometry.merge(kind, batch).grid))
        return tuple(found)
