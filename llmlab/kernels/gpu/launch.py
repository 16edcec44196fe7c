"""One layer's attention of one step, started by Triton's own launcher on torch tensors: for tests and benchmarks.

An engine starts the same kernels from their compiled binaries, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmlab.errors import require
from llmlab.kernels.gpu import geometry
from llmlab.kernels.gpu.decode import merge_splits, paged_decode
from llmlab.kernels.gpu.geometry import AttentionKind, Launch
from llmlab.kernels.gpu.prefill import paged_prefill
from llmlab.kernels.gpu.write import locate_tokens, rope_and_write


@dataclass
class Step:
    """What PagedAttention reads in one step, as torch tensors of one device; see `kernels/reference.py` for the meaning.

    q, k, v [T, heads · head_dim] may be views of one packed tensor. cos, sin f32 [positions, rotary / 2], or None for no
    RoPE. alibi_slopes and sinks f32 [num_heads] where `kind` has them; k_scale and v_scale f32 [kv_heads] where it is quantized.
    """

    kind: AttentionKind
    scale: float
    q: Any
    k: Any
    v: Any
    pool: Any
    query_start: Any
    kv_len: Any
    block_table: Any
    position_ids: Any
    cos: Any = None
    sin: Any = None
    interleaved: bool = False
    alibi_slopes: Any = None
    sinks: Any = None
    k_scale: Any = None
    v_scale: Any = None

    @property
    def _pool_half(self) -> int:
        return int(self.pool[0].numel())


def _start(kernel: Any, launch: Launch, *arguments: Any) -> None:
    kernel[launch.grid](*arguments, **launch.constants, **launch.options)


def write(step: Step, q_out: Any) -> None:
    """RoPE and the write of k and v into the pool; the turned q goes to `q_out` [T, num_heads · head_dim]."""
    torch = require("torch", "export")
    kind, tokens = step.kind, len(step.position_ids)
    slots = torch.full((tokens,), -1, dtype=torch.int64, device=step.q.device)
    batch, stride = len(step.kv_len), step.block_table.stride(0)
    _start(
        locate_tokens,
        geometry.locate(kind.block_size, batch),
        slots,
        step.query_start,
        step.kv_len,
        step.block_table,
        stride,
    )
    rotary = 0 if step.cos is None else 2 * step.cos.shape[1]
    _start(
        rope_and_write,
        geometry.write(kind, tokens, rotary=rotary, interleaved=step.interleaved),
        *(q_out, step.pool, step.q, step.k, step.v, slots, step.position_ids, step.cos, step.sin),
        *(step.k_scale, step.v_scale, step.q.stride(0), step.k.stride(0), step.v.stride(0)),
        step._pool_half,
    )


def decode(step: Step, q: Any, out: Any, splits: int) -> None:
    """Attention of the sequences with one new token, their keys in `splits` parts, into their rows of `out`."""
    torch = require("torch", "export")
    kind, batch = step.kind, len(step.kv_len)
    partial = torch.empty((batch, kind.num_heads, splits, kind.head_dim), device=q.device)
    lse = torch.empty((batch, kind.num_heads, splits), device=q.device)
    _start(
        paged_decode,
        geometry.decode(kind, batch, splits),
        *(out, partial, lse, q, step.pool, step.query_start, step.kv_len, step.block_table),
        *(step.alibi_slopes, step.sinks, step.k_scale, step.v_scale, step.scale),
        *(q.stride(0), step._pool_half, step.block_table.stride(0), splits),
    )
    if splits > 1:
        _start(merge_splits, geometry.merge(kind, batch), out, partial, lse, step.query_start, step.sinks, splits)


def prefill(step: Step, q: Any, out: Any, *, decodes: bool) -> None:
    """Attention of the sequences with several new tokens (and, with `decodes`, of those with one) into their rows."""
    kind, batch = step.kind, len(step.kv_len)
    _start(
        paged_prefill,
        geometry.prefill(kind, len(q), batch, decodes=decodes),
        *(out, q, step.pool, step.query_start, step.kv_len, step.block_table),
        *(step.alibi_slopes, step.sinks, step.k_scale, step.v_scale, step.scale),
        *(q.stride(0), step._pool_half, step.block_table.stride(0), batch),
    )
