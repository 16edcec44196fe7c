"""PagedAttention in NumPy: slow, plain, and the oracle of every other implementation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmlab.kernels.kv_cache import dequantize, per_channel, quantize

Array = NDArray[np.floating]


def rope(x: Array, positions: NDArray[np.int64], cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Rotary position embedding (Su et al., 2021) of x [T, heads, dim] at `positions` [T].

    cos, sin: [max_position, rotary_dim / 2]; only the first rotary_dim channels turn. Pairs are channels (i, i + half),
    or (2i, 2i + 1) where `interleaved`.
    """
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    c, s = cos[positions][:, None], sin[positions][:, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = np.empty_like(turned)
        out[..., 0::2], out[..., 1::2] = a * c - b * s, b * c + a * s
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = np.concatenate([a * c - b * s, b * c + a * s], -1)
    return np.concatenate([out, rest], -1)


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    kv_cache: Array,
    query_start: NDArray[np.int32],
    kv_len: NDArray[np.int32],
    block_table: NDArray[np.int32],
    position_ids: NDArray[np.int64],
    cos: Array | None = None,
    sin: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    interleaved: bool = False,
) -> tuple[Array, Array]:
    """One step of causal attention over a pool of KV blocks, for T new tokens of B sequences laid end to end.

    q: [T, num_heads · head_dim], k and v: [T, kv_num_heads · head_dim], before RoPE where cos and sin are given.
    kv_cache: [2, blocks, kv_num_heads, block_size, head_dim], keys first. query_start [B+1], kv_len [B] (keys after
    this step), block_table [B, max_blocks], position_ids [T]: as in the serving graph.
    cos, sin: [max_position, rotary_dim / 2], as for `rope`. alibi_slopes [num_heads]: slope · (key − query) is added to each
    score (ALiBi: Press et al., 2022). sinks [num_heads]: a logit in each softmax's denominator that no value belongs to
    (Xiao et al., 2024, as gpt-oss learns it).
    k_scale, v_scale [kv_num_heads] or [kv_num_heads, head_dim]: given where the pool is int8, int4 or float8_e4m3fn; what it holds
    (`kernels/kv_cache.py`) times these are the keys, turned, and the values. New tokens are attended to as they lie in the pool.
    window: keys a token sees, itself included; 0 for all. softcap: scores become softcap · tanh(score / softcap), before
    ALiBi; 0 for none.

    RoPE, scores and sums are computed in float32 at least, whatever the tensors come in.
    Returns the result [T, num_heads · head_dim] and the pool with the new keys and values written (the given pool
    is not touched).
    """
    tokens, block_size, dtype = len(q), kv_cache.shape[3], q.dtype
    wide = np.result_type(dtype, np.float32)
    pool = kv_cache.copy()
    q = q.reshape(tokens, num_heads, head_dim).astype(wide)
    k = k.reshape(tokens, kv_num_heads, head_dim).astype(wide)
    v = v.reshape(tokens, kv_num_heads, head_dim)
    if cos is not None and sin is not None:
        q = rope(q, position_ids, cos, sin, interleaved=interleaved)
        k = rope(k, position_ids, cos, sin, interleaved=interleaved)
    scales = [None if s is None else per_channel(s, kv_num_heads, head_dim) for s in (k_scale, v_scale)]
    k, v = (x if s is None else quantize(x, s, pool.dtype) for x, s in zip((k, v), scales, strict=True))
    out = np.zeros_like(q)
    for b, length in enumerate(kv_len):
        rows = slice(query_start[b], query_start[b + 1])
        new = query_start[b + 1] - query_start[b]
        index = np.arange(length)
        blocks, offsets = block_table[b, index // block_size], index % block_size
        pool[0, blocks[length - new :], :, offsets[length - new :]] = k[rows]
        pool[1, blocks[length - new :], :, offsets[length - new :]] = v[rows]
        seen = (pool[half, blocks, :, offsets] for half in range(2))  # [length, kv_heads, dim]
        keys, values = (x.astype(wide) if s is None else dequantize(x, s) for x, s in zip(seen, scales, strict=True))
        at = np.arange(length - new, length)[:, None]
        visible = (index <= at) & (index > at - (window or length + 1))
        for h in range(num_heads):
            group = h * kv_num_heads // num_heads
            score = (q[rows, h] @ keys[:, group].T) * scale
            if softcap:
                score = softcap * np.tanh(score / softcap)
            if alibi_slopes is not None:
                score = score + alibi_slopes[h] * (index - at).astype(score.dtype)
            score = np.where(visible, score, -np.inf)
            most = score.max(-1, keepdims=True)
            if sinks is not None:
                most = np.maximum(most, sinks[h])
            weight = np.exp(score - most)
            total = weight.sum(-1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(sinks[h] - most)
            out[rows, h] = (weight / total) @ values[:, group]
    return out.reshape(tokens, num_heads * head_dim).astype(dtype), pool
