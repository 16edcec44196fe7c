"""Paged attention for prefill and extend: chunks of new tokens on any past, ragged, a group's heads packed in a tile."""

from __future__ import annotations

from llmlab.errors import require
from llmlab.kernels.gpu.common import LOG2E, block_rows, find_sequence, score, start_early

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")


@triton.jit
def _attend(
    q_tile, acc, total, best, start, end, table, pool, pool_half, head, at, slope, scale2, dims,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys start:end. MASKED: some of them may be hidden from some rows; `at` [rows] is each row's position."""
    in_head = dims < HEAD_DIM
    for first in range(start, end, TILE):
        keys = first + tl.arange(0, TILE)
        rows = block_rows(table, keys, end, head, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        if MASKED:
            k = tl.load(pool + rows[None] + dims[:, None], mask=(keys < end)[None] & in_head[:, None], other=0.0)
            v = tl.load(
                pool + pool_half + rows[:, None] + dims[None], mask=(keys < end)[:, None] & in_head[None], other=0.0
            )
        else:
            k = tl.load(pool + rows[None] + dims[:, None], mask=in_head[:, None], other=0.0)
            v = tl.load(pool + pool_half + rows[:, None] + dims[None], mask=in_head[None], other=0.0)
        s = score(q_tile, k.to(q_tile.dtype), scale2, SOFTCAP)
        if ALIBI:
            s += slope[:, None] * (keys[None] - at[:, None]).to(tl.float32)
        if MASKED:
            visible = keys[None] <= at[:, None]
            if WINDOW > 0:
                visible = visible & (keys[None] > at[:, None] - WINDOW)
            s = tl.where(visible, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        base = new
        if MASKED:
            base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(q_tile.dtype), v.to(q_tile.dtype), acc)
        best = new
    return acc, total, best


@triton.jit
def paged_prefill(
    out,  # [T, num_heads · HEAD_DIM]
    q,  # [T, num_heads · HEAD_DIM], rows `q_stride` apart
    pool,  # [2, blocks, kv_heads, BLOCK_SIZE, HEAD_DIM]
    query_start,  # i32 [B+1]
    kv_len,  # i32 [B]
    block_table,  # i32 [B, table_stride]
    alibi_slopes,  # f32 [num_heads]; read where ALIBI
    sinks,  # f32 [num_heads]; read where SINKS
    k_scale,  # f32 [kv_heads]; read where QUANTIZED
    v_scale,  # f32 [kv_heads]
    scale,  # f32
    q_stride,
    pool_half,
    table_stride,
    num_seqs,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,  # new tokens a tile
    ROWS: tl.constexpr,  # power of two, at least TOKENS · GROUP
    TILE: tl.constexpr,  # keys a step of the loop
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DECODES: tl.constexpr,  # whether sequences with one new token are done here too
    EARLY: tl.constexpr = False,  # see `start_early`
):
    """Grid (T // TOKENS + B, KV_HEADS): see `find_sequence`; tiles past a sequence's end return at once."""
    start_early(EARLY)
    # Later tiles see more keys: they start first, so that the longest don't finish last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    seq = find_sequence(query_start, tile, num_seqs, TOKENS)
    begin = tl.load(query_start + seq)
    new_tokens = tl.load(query_start + seq + 1) - begin
    token = (tile - (begin // TOKENS + seq)) * TOKENS  # first of this tile, counted from the sequence's first new one
    if token >= new_tokens:
        return
    if not DECODES and new_tokens == 1:
        return
    past = tl.load(kv_len + seq) - new_tokens
    r = tl.arange(0, ROWS)
    of_tile, heads = r // GROUP, head * GROUP + r % GROUP
    real = (of_tile < TOKENS) & (token + of_tile < new_tokens)
    dims = tl.arange(0, DIM_PAD)
    where = (begin + token + of_tile).to(tl.int64)
    mask = real[:, None] & (dims < HEAD_DIM)[None]
    q_tile = tl.load(q + (where * q_stride + heads * HEAD_DIM)[:, None] + dims[None], mask=mask, other=0.0)
    at = past + token + of_tile
    scale2 = scale * LOG2E
    if QUANTIZED:
        scale2 = scale2 * tl.load(k_scale + head)
    slope = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slope = tl.load(alibi_slopes + heads) * LOG2E
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)

    last = tl.minimum(past + token + TOKENS, past + new_tokens)  # keys that any row here sees
    first = 0
    if WINDOW > 0:
        first = tl.maximum(past + token + 1 - WINDOW, 0) // TILE * TILE
    table = block_table + seq * table_stride
    plain = first
    if WINDOW == 0:
        plain = (past + token + 1) // TILE * TILE  # whole tiles of keys that every row sees
        acc, total, best = _attend(
            q_tile, acc, total, best, 0, plain, table, pool, pool_half, head, at, slope, scale2, dims,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, ALIBI, False,
        )  # fmt: skip
    acc, total, best = _attend(
        q_tile, acc, total, best, plain, last, table, pool, pool_half, head, at, slope, scale2, dims,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, ALIBI, True,
    )  # fmt: skip
    if QUANTIZED:
        acc = acc * tl.load(v_scale + head)
    if SINKS:
        total += tl.exp2(tl.load(sinks + heads) * LOG2E - best)
    result = acc / total[:, None]
    width = KV_HEADS * GROUP * HEAD_DIM
    tl.store(out + (where * width + heads * HEAD_DIM)[:, None] + dims[None], result.to(out.dtype.element_ty), mask=mask)
