"""RoPE on q and k, and the write of k and v into the block pool, in one pass over a step's tokens."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import start_early

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def locate_tokens(
    slots,  # i64 [T]: block · BLOCK_SIZE + offset of each token in the pool; rows of no sequence are left alone
    query_start,  # i32 [B+1]
    kv_len,  # i32 [B]
    block_table,  # i32 [B, table_stride]
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (B, chunks): once a step, for all layers. Each program strides over its sequence's new tokens."""
    seq = tl.program_id(0)
    begin, end = tl.load(query_start + seq), tl.load(query_start + seq + 1)
    past = tl.load(kv_len + seq) - (end - begin)
    for first in range(tl.program_id(1) * CHUNK, end - begin, tl.num_programs(1) * CHUNK):
        token = first + tl.arange(0, CHUNK)
        mask = token < end - begin
        at = past + token
        block = tl.load(block_table + seq * table_stride + at // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
        tl.store(slots + begin + token, block * BLOCK_SIZE + at % BLOCK_SIZE, mask=mask)


@triton.jit
def _quantize(x, scale, dtype: tl.constexpr):
    scaled = x / scale
    if dtype == tl.int8:
        held = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
        return ((held + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 · 2²³: to the nearest, ties to even
    return tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(dtype)


@triton.jit
def rope_and_write(
    q_out,  # [T, KV_HEADS · GROUP · HEAD_DIM]
    pool,  # [2, blocks, kv_heads, BLOCK_SIZE, HEAD_DIM]
    q,  # rows `q_stride` apart
    k,  # rows `k_stride` apart
    v,  # rows `v_stride` apart
    slots,  # i64 [T], of locate_tokens; -1 for a row of no sequence
    position_ids,  # i32 or i64 [T]
    cos,  # f32 [positions, ROTARY / 2]
    sin,
    k_scale,  # f32 [kv_heads]; read where QUANTIZED
    v_scale,
    q_stride,
    k_stride,
    v_stride,
    pool_half,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,  # channels that turn; 0 for none
    INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (T, KV_HEADS): one token's group of query heads, its key and its value. Rows whose slot is negative are left alone."""
    start_early(EARLY)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    dims = tl.arange(0, DIM_PAD)
    in_head = dims < HEAD_DIM
    member = tl.arange(0, GROUP_PAD)
    q_mask = (member < GROUP)[:, None] & in_head[None]
    q_row = q + token * q_stride + (head * GROUP + member)[:, None] * HEAD_DIM
    k_row = k + token * k_stride + head * HEAD_DIM
    turned_q = tl.load(q_row + dims[None], mask=q_mask, other=0.0).to(tl.float32)
    turned_k = tl.load(k_row + dims, mask=in_head, other=0.0).to(tl.float32)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        if INTERLEAVED:
            pair, partner, first = dims // 2, dims ^ 1, dims % 2 == 0
        else:
            pair, first = dims % half, dims < half
            partner = tl.where(first, dims + half, dims - half)
        turns = dims < ROTARY
        angle = tl.load(position_ids + token) * half + pair
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        s = tl.where(first, -s, s)
        q_other = tl.load(q_row + partner[None], mask=q_mask & turns[None], other=0.0).to(tl.float32)
        k_other = tl.load(k_row + partner, mask=turns, other=0.0).to(tl.float32)
        turned_q = turned_q * c[None] + q_other * s[None]
        turned_k = turned_k * c + k_other * s
    width = KV_HEADS * GROUP * HEAD_DIM
    q_place = q_out + token * width + (head * GROUP + member)[:, None] * HEAD_DIM + dims[None]
    tl.store(q_place, turned_q.to(q_out.dtype.element_ty), mask=q_mask)
    value = tl.load(v + token * v_stride + head * HEAD_DIM + dims, mask=in_head, other=0.0).to(tl.float32)
    place = ((slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dims
    if QUANTIZED:
        dtype: tl.constexpr = pool.dtype.element_ty
        tl.store(pool + place, _quantize(turned_k, tl.load(k_scale + head), dtype), mask=in_head)
        tl.store(pool + pool_half + place, _quantize(value, tl.load(v_scale + head), dtype), mask=in_head)
    else:
        tl.store(pool + place, turned_k.to(pool.dtype.element_ty), mask=in_head)
        tl.store(pool + pool_half + place, value.to(pool.dtype.element_ty), mask=in_head)
