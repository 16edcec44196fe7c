"""The oracle of all attention kernels, against attention written out one query and one key at a time."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from llmlab.kernels.reference import paged_attention, rope

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4
COS, SIN = (f(np.outer(np.arange(64), [1.0, 0.3, 0.1, 0.03])).astype(np.float32) for f in (np.cos, np.sin))


def turned(x: np.ndarray, position: int, interleaved: bool) -> np.ndarray:
    """RoPE by complex numbers: channel pairs are multiplied by e^{i·angle}."""
    half = COS.shape[1]
    pairs = x[0 : 2 * half : 2] + 1j * x[1 : 2 * half : 2] if interleaved else x[:half] + 1j * x[half : 2 * half]
    pairs = pairs * (COS[position] + 1j * SIN[position])
    out = x.copy()
    if interleaved:
        out[0 : 2 * half : 2], out[1 : 2 * half : 2] = pairs.real, pairs.imag
    else:
        out[:half], out[half : 2 * half] = pairs.real, pairs.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 12])
def test_rope_is_a_rotation(interleaved: bool, width: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, 2, width)).astype(np.float32)
    positions = np.array([0, 3, 1, 63, 7])
    found = rope(x, positions, COS, SIN, interleaved=interleaved)
    for t, position in enumerate(positions):
        for h in range(2):
            np.testing.assert_allclose(found[t, h], turned(x[t, h], int(position), interleaved), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[..., 8:], x[..., 8:])


def by_hand(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    window: int,
    softcap: float,
    roped: bool,
    interleaved: bool,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention of one whole sequence [tokens, heads, dim], with loops."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        for h in range(HEADS):
            group = h // (HEADS // KV_HEADS)
            first = max(0, t - window + 1) if window else 0
            query = turned(q[t, h], t, interleaved) if roped else q[t, h]
            scores = []
            for s in range(first, t + 1):
                key = turned(k[s, group], s, interleaved) if roped else k[s, group]
                score = float(query @ key) * scale
                score = softcap * math.tanh(score / softcap) if softcap else score
                scores.append(score - float(alibi_slopes[h]) * (t - s) if alibi_slopes is not None else score)
            if sinks is not None:
                scores.append(float(sinks[h]))
            weights = np.exp(np.array(scores) - max(scores))
            out[t, h] = (weights / weights.sum())[: t + 1 - first] @ v[first : t + 1, group]
    return out


SLOPES = np.array([0.5, 0.25, 0.1, 2.0], np.float32)
SINKS = np.array([0.3, -5.0, 40.0, 1.0], np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alibi_slopes": SLOPES},
        {"sinks": SINKS},
        {"alibi_slopes": SLOPES, "sinks": SINKS, "window": 3, "softcap": 1.0, "roped": True},
        {"window": 1},
        {"window": 5},
        {"softcap": 2.0},
        {"roped": True},
        {"roped": True, "interleaved": True, "window": 3, "softcap": 1.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_ragged_steps_over_scattered_blocks(options: dict) -> None:
    """Three sequences arrive in pieces; what no token was written to is NaN and must never be read."""
    options = dict(options)
    roped = options.pop("roped", False)
    rng = np.random.default_rng(0)
    lengths = (13, 4, 1)
    tables = np.array([[7, 2, 9, 0], [4, -1, -1, -1], [1, -1, -1, -1]], np.int32)
    data = [[rng.standard_normal((n, h, DIM)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS)] for n in lengths]
    pool = np.full((2, 10, KV_HEADS, BLOCK, DIM), np.nan, np.float32)
    found: list[list[np.ndarray]] = [[], [], []]
    done = [0, 0, 0]
    for counts in ((5, 0, 1), (1, 4, 0), (7, 0, 0)):
        chosen = [b for b, n in enumerate(counts) if n]
        new = [counts[b] for b in chosen]
        rows = [
            np.concatenate([data[b][i][done[b] : done[b] + n] for b, n in zip(chosen, new, strict=True)])
            for i in range(3)
        ]
        positions = np.concatenate([np.arange(done[b], done[b] + n) for b, n in zip(chosen, new, strict=True)])
        before = pool.copy()
        out, after = paged_attention(
            *(r.reshape(len(positions), -1) for r in rows),
            pool,
            np.cumsum([0, *new]).astype(np.int32),
            np.array([done[b] + n for b, n in zip(chosen, new, strict=True)], np.int32),
            tables[chosen],
            positions,
            *((COS, SIN) if roped else ()),
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            head_dim=DIM,
            scale=0.3,
            **options,
        )
        np.testing.assert_array_equal(pool, before)
        assert (~np.isnan(after)).sum() - (~np.isnan(pool)).sum() == 2 * sum(new) * KV_HEADS * DIM
        pool, at = after, 0
        for b, n in zip(chosen, new, strict=True):
            found[b].append(out[at : at + n])
            at, done[b] = at + n, done[b] + n
    full = {"scale": 0.3, "window": 0, "softcap": 0.0, "interleaved": False, "roped": roped} | options
    for b, (q, k, v) in enumerate(data):
        expected = by_hand(q, k, v, **full)
        np.testing.assert_allclose(np.concatenate(found[b]).reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_later_tokens_are_not_seen() -> None:
    """A chunk of four: changing its last token changes the last row alone."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, h * DIM)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
    pool = np.zeros((2, 1, KV_HEADS, BLOCK, DIM), np.float32)
    metadata = (np.array([0, 4], np.int32), np.array([4], np.int32), np.array([[0]], np.int32), np.arange(4))
    sizes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "head_dim": DIM, "scale": 0.3}
    first, _ = paged_attention(q, k, v, pool, *metadata, **sizes)
    k[3], v[3] = 5, 7
    second, _ = paged_attention(q, k, v, pool, *metadata, **sizes)
    np.testing.assert_array_equal(first[:3], second[:3])
    assert np.abs(first[3] - second[3]).max() > 0.1


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(), (KV_HEADS,), (KV_HEADS, DIM)])
def test_a_quantized_pool_is_the_wide_one_of_rounded_keys_and_values(dtype: str, shape: tuple[int, ...]) -> None:
    """Written out number by number: divide, round to the nearest (even where two are as near), hold within the range."""
    rng = np.random.default_rng(1)
    tokens, kind = 6, np.dtype(getattr(ml_dtypes, dtype, dtype))
    low, high = {"int8": (-128, 127), "int4": (-8, 7), "float8_e4m3fn": (-448, 448)}[dtype]
    q, k, v = (rng.standard_normal((tokens, n * DIM)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    scales = [rng.uniform(0.5, 1.5, shape).astype(np.float32) * np.float32(2 / high) for _ in "kv"]
    tables = [np.array([0, tokens], np.int32), np.array([tokens], np.int32), np.array([[1, 0]], np.int32)]
    options = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "head_dim": DIM, "scale": 0.4}
    pool = np.zeros((2, 2, KV_HEADS, BLOCK, DIM), kind)
    out, after = paged_attention(
        q, k, v, pool, *tables, np.arange(tokens), k_scale=scales[0], v_scale=scales[1], **options
    )
    assert after.dtype == kind and not pool.astype(np.float32).any()

    def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        heads = x.reshape(tokens, KV_HEADS, DIM).copy()
        for at in np.ndindex(heads.shape):
            by = float(np.broadcast_to(scale.reshape(*shape, *[1] * (2 - len(shape))), (KV_HEADS, DIM))[at[1:]])
            number = min(max(float(heads[at]) / by, low), high)
            heads[at] = (round(number) if dtype.startswith("int") else float(kind.type(number))) * by
        return heads.reshape(x.shape)

    wide, _ = paged_attention(
        q, rounded(k, scales[0]), rounded(v, scales[1]), pool.astype(np.float32), *tables, np.arange(tokens), **options
    )
    np.testing.assert_allclose(out, wide, rtol=1e-4, atol=1e-5)
    plain, _ = paged_attention(q, k, v, pool.astype(np.float32), *tables, np.arange(tokens), **options)
    assert np.abs(out - plain).max() > 1e-3
