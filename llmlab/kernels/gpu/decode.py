"""Paged attention for decode: one new token a sequence, its keys split over programs, a group's heads packed in a tile."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import LOG2E, block_rows, softcapped, start_early
from llmlab.kernels.gpu.unpack import as_words, unpack

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def paged_decode(
    out,  # [T, num_heads · HEAD_DIM]; written where not SPLIT
    partial,  # f32 [B, num_heads, splits, HEAD_DIM]; written where SPLIT
    partial_lse,  # f32 [B, num_heads, splits]: log2 of the split's softmax sum, -inf where it has no keys
    q,  # [T, num_heads · HEAD_DIM], rows `q_stride` apart
    pool,  # [2, blocks, kv_heads, BLOCK_SIZE, HEAD_DIM]
    query_start,  # i32 [B+1]
    kv_len,  # i32 [B]
    block_table,  # i32 [B, table_stride]
    alibi_slopes,  # f32 [num_heads]; read where ALIBI
    sinks,  # f32 [num_heads]; read where SINKS
    k_scale,  # f32 [kv_heads]; read where the pool is int8 or fp8 (QUANTIZED)
    v_scale,  # f32 [kv_heads]
    scale,  # f32
    q_stride,
    pool_half,  # elements of the keys' half of the pool
    table_stride,
    splits,  # programs that share a sequence's keys; read where SPLIT
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    GROUP_PAD: tl.constexpr,  # GROUP rounded up to a power of two, at least 16: the rows of a tensor-core tile
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # keys a step of the loop
    SPLIT: tl.constexpr,  # whether a sequence's keys are shared by several programs
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (B, KV_HEADS, splits). Sequences with another number of new tokens than one are left alone."""
    start_early(EARLY)
    seq, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) - row != 1:
        return
    length = tl.load(kv_len + seq)
    member = tl.arange(0, GROUP_PAD)
    heads = head * GROUP + member
    real = member < GROUP
    STEP: tl.constexpr = 2 if QUANTIZED else 1  # channels that lie in one word of the pool
    WORDS: tl.constexpr = DIM_PAD // STEP
    WIDTH: tl.constexpr = HEAD_DIM // STEP
    words = tl.arange(0, WORDS)
    in_head = words < WIDTH
    q_mask = real[:, None] & in_head[None]
    q_at = q + row.to(tl.int64) * q_stride + heads[:, None] * HEAD_DIM + words[None] * STEP
    q_tile = tl.load(q_at, mask=q_mask, other=0.0)
    scale2 = scale * LOG2E
    if QUANTIZED:  # the pool's values become float16, in even and odd channels
        q_odd = tl.load(q_at + 1, mask=q_mask, other=0.0)
        scale2 = scale2 * tl.load(k_scale + head)
        if q_tile.dtype != tl.float16:  # rows brought into its range
            peak = tl.maximum(tl.max(tl.abs(q_tile).to(tl.float32), 1), tl.max(tl.abs(q_odd).to(tl.float32), 1))
            peak = tl.where(peak > 0, peak, 1.0)[:, None]
            q_tile, q_odd = (q_tile / peak).to(tl.float16), (q_odd / peak).to(tl.float16)
            scale2 = scale2 * peak
        FLOAT8: tl.constexpr = pool.dtype.element_ty != tl.int8
        pool = as_words(pool)
        pool_half = pool_half // STEP
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE * TILE
    start, end = first, length
    if SPLIT:
        tiles = tl.cdiv(tl.cdiv(length - first, TILE), splits)
        start = first + split * tiles * TILE
        end = tl.minimum(start + tiles * TILE, length)

    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, WORDS], tl.float32)
    acc_odd = tl.zeros([GROUP_PAD, WORDS], tl.float32)
    slope = tl.zeros([GROUP_PAD], tl.float32)
    if ALIBI:
        slope = tl.load(alibi_slopes + heads, mask=real, other=0.0) * LOG2E
    table = block_table + seq * table_stride
    for at in range(start, end, TILE):
        keys = at + tl.arange(0, TILE)
        rows = block_rows(table, keys, end, head, KV_HEADS, BLOCK_SIZE, WIDTH)
        visible = keys < end
        if WINDOW > 0:
            visible = visible & (keys >= length - WINDOW)
        k = tl.load(pool + rows[None] + words[:, None], mask=visible[None] & in_head[:, None], other=0)
        v = tl.load(pool + pool_half + rows[:, None] + words[None], mask=visible[:, None] & in_head[None], other=0)
        if QUANTIZED:
            k, k_odd = unpack(k, FLOAT8)
            s = tl.dot(q_odd, k_odd, tl.dot(q_tile, k))
        else:
            s = tl.dot(q_tile, k)
        s = softcapped(s * scale2, SOFTCAP)
        if ALIBI:
            s += slope[:, None] * (keys - (length - 1))[None].to(tl.float32)
        s = tl.where(visible[None], s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(p, 1)
        weight = p.to(q_tile.dtype)
        if QUANTIZED:
            v, v_odd = unpack(v, FLOAT8)
            acc_odd = tl.dot(weight, v_odd, acc_odd * fade[:, None])
        acc = tl.dot(weight, v, acc * fade[:, None])
        best = new

    dims = tl.arange(0, DIM_PAD)
    in_head = dims < HEAD_DIM
    if QUANTIZED:
        acc = tl.interleave(acc, acc_odd) * tl.load(v_scale + head)
    if not SPLIT:
        if SINKS:
            total += tl.exp2(tl.load(sinks + heads, mask=real, other=0.0) * LOG2E - best)
        result = acc / total[:, None]
        tl.store(
            out + row.to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None],
            result.to(out.dtype.element_ty),
            mask=real[:, None] & in_head[None],
        )
    else:
        place = (seq * KV_HEADS * GROUP + heads) * splits + split
        safe = tl.where(total > 0, total, 1.0)
        tl.store(partial_lse + place, tl.where(total > 0, best + tl.log2(safe), float("-inf")), mask=real)
        tl.store(
            partial + place[:, None].to(tl.int64) * HEAD_DIM + dims[None],
            acc / safe[:, None],
            mask=real[:, None] & in_head[None],
        )


@triton.jit
def merge_splits(
    out,  # [T, num_heads · HEAD_DIM]
    partial,  # f32 [B, NUM_HEADS, splits, HEAD_DIM]
    partial_lse,  # f32 [B, NUM_HEADS, splits]
    query_start,  # i32 [B+1]
    sinks,  # f32 [NUM_HEADS]; read where SINKS
    splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MOST: tl.constexpr,  # power of two, at least the most splits there are
    SINKS: tl.constexpr,
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (B, NUM_HEADS): the splits' results, weighted by their softmax sums."""
    start_early(EARLY)
    seq, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) - row != 1:
        return
    split, dims = tl.arange(0, MOST), tl.arange(0, DIM_PAD)
    place = (seq * NUM_HEADS + head) * splits + split
    lse = tl.load(partial_lse + place, mask=split < splits, other=float("-inf"))
    best = tl.max(lse, 0)
    weight = tl.exp2(lse - best)
    values = tl.load(
        partial + place[:, None].to(tl.int64) * HEAD_DIM + dims[None],
        mask=(split < splits)[:, None] & (dims < HEAD_DIM)[None],
        other=0.0,
    )
    total = tl.sum(weight, 0)
    if SINKS:
        total += tl.exp2(tl.load(sinks + head) * LOG2E - best)
    result = tl.sum(values * weight[:, None], 0) / total
    tl.store(
        out + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims,
        result.to(out.dtype.element_ty),
        mask=dims < HEAD_DIM,
    )
