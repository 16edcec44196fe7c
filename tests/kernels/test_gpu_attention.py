"""The Triton kernels against the NumPy reference: on the GPU where there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402 (the interpreter is chosen when it is imported)
import triton.language as tl  # noqa: E402

from llmlab.kernels.gpu import geometry, launch  # noqa: E402
from llmlab.kernels.gpu.geometry import AttentionKind  # noqa: E402
from llmlab.kernels.gpu.unpack import as_words, unpack  # noqa: E402
from llmlab.kernels.reference import paged_attention  # noqa: E402

TOLERANCE = 2e-3  # of the worst row, ‖out − ref‖ / ‖ref‖ in fp16


def worst_row(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(t.float().cpu() if torch.is_tensor(t) else t) for t in (found, expected))
    if not np.isfinite(found).all():  # not written, or not with numbers
        return float("inf")
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


# A decode on a past, a chunk on a past, a one-token prompt, a prompt of exactly one block, an idle row, a first prompt.
NEW, PAST = (1, 5, 1, 16, 0, 19), (21, 7, 0, 0, 9, 0)
KINDS = {
    "MHA": (AttentionKind(2, 2, 32, 16), 0, False),
    "GQA, RoPE": (AttentionKind(4, 2, 64, 16), 64, False),
    "MQA of 3 heads, partial interleaved RoPE": (AttentionKind(3, 1, 80, 32), 32, True),
    "window, softcap": (AttentionKind(4, 2, 32, 16, window=9, softcap=2.0), 32, False),
    "window wider than a tile of keys, sinks": (AttentionKind(2, 1, 16, 16, window=70, sinks=True), 16, False),
    "ALiBi": (AttentionKind(4, 2, 16, 16, alibi=True), 0, False),
}
# Each takes seconds under the interpreter: the first of them always, the rest nightly, and all on a GPU.
every_kind = pytest.mark.parametrize(
    "name", [n if i == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(KINDS)]
)


@dataclass
class Case:
    """A step for the kernels, the same for the reference, and what the reference says of it."""

    step: launch.Step
    expected: np.ndarray
    pool_after: np.ndarray

    def written(self) -> Any:
        out = torch.full((len(self.step.q), self.step.kind.num_heads * self.step.kind.head_dim), torch.nan)
        q = out.to(self.step.q.dtype).to(DEVICE)
        launch.write(self.step, q)
        return q

    def error(self, out: Any) -> float:
        return worst_row(out, self.expected)


def case(
    kind: AttentionKind,
    rotary: int = 0,
    interleaved: bool = False,
    new: tuple[int, ...] = NEW,
    past: tuple[int, ...] = PAST,
    dtype: torch.dtype = torch.float16,
    pool_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return torch.tensor(rng.standard_normal(shape).astype(np.float32))

    lengths = np.array(new) + past
    blocks = -(-lengths // kind.block_size)
    free = rng.permutation(int(blocks.sum()) + 2).tolist()
    table = np.full((len(new), blocks.max() + 1), -1, np.int32)
    for b, count in enumerate(blocks):
        table[b, :count] = [free.pop() for _ in range(count)]
    k_scale, v_scale = (torch.tensor(rng.uniform(0.03, 0.05, kind.kv_heads).astype(np.float32)) for _ in range(2))
    scales = torch.stack([k_scale, v_scale])[:, None, :, None, None] if kind.quantized else torch.ones(1)
    pool = draw(2, int(blocks.sum()) + 2, kind.kv_heads, kind.block_size, kind.head_dim) / scales
    pool = (pool.round().clamp(-127, 127) if pool_dtype == torch.int8 else pool).to(pool_dtype or dtype)
    angle = torch.outer(torch.arange(128), 0.8 ** torch.arange(max(1, rotary // 2)))
    cos, sin = (torch.cos(angle), torch.sin(angle)) if rotary else (None, None)
    widths = [kind.num_heads * kind.head_dim] + [kind.kv_heads * kind.head_dim] * 2
    packed = draw(sum(new), sum(widths)).to(dtype)
    q, k, v = packed.split(widths, 1)
    step = launch.Step(
        kind, kind.head_dim**-0.5, q, k, v, pool, *(torch.tensor(np.cumsum([0, *new]), dtype=torch.int32),),
        torch.tensor(lengths, dtype=torch.int32), torch.tensor(table),
        torch.tensor(np.concatenate([np.arange(p, p + n) for n, p in zip(new, past, strict=True)])), cos, sin, interleaved,
        0.5 ** (1.0 + torch.arange(kind.num_heads)) if kind.alibi else None, draw(kind.num_heads) if kind.sinks else None,
        k_scale, v_scale,
    )  # fmt: skip
    arrays = {
        n: None if t is None else t.float().numpy() for n, t in vars(step).items() if torch.is_tensor(t) or t is None
    }
    expected, after = paged_attention(
        arrays["q"], arrays["k"], arrays["v"], (pool.float() * scales).numpy(),
        *(getattr(step, n).numpy() for n in ("query_start", "kv_len", "block_table", "position_ids")),
        arrays["cos"], arrays["sin"], arrays["alibi_slopes"], arrays["sinks"],
        num_heads=kind.num_heads, kv_num_heads=kind.kv_heads, head_dim=kind.head_dim, scale=step.scale,
        window=kind.window, softcap=kind.softcap, interleaved=interleaved,
    )  # fmt: skip
    on_device = {n: t.to(DEVICE) for n, t in vars(step).items() if torch.is_tensor(t)}
    if DEVICE == "cuda":
        on_device |= dict(zip(("q", "k", "v"), packed.to(DEVICE).split(widths, 1), strict=True))
    return Case(replace(step, **on_device), expected, after)


def poisoned(given: Case) -> Any:
    return torch.full((len(given.step.q), given.expected.shape[1]), torch.nan, dtype=given.step.q.dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "splits"),
    [*((name, 3) for name in KINDS), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in KINDS)],
)
def test_a_mixed_step_equals_the_reference(name: str, splits: int) -> None:
    given = case(*KINDS[name])
    q, out = given.written(), poisoned(given)
    launch.prefill(given.step, q, out, decodes=False)
    launch.decode(given.step, q, out, splits)
    assert given.error(out) < TOLERANCE


@every_kind
def test_one_kernel_does_a_mixed_step_too(name: str) -> None:
    given = case(*KINDS[name])
    out = poisoned(given)
    launch.prefill(given.step, given.written(), out, decodes=True)
    assert given.error(out) < TOLERANCE


@pytest.mark.parametrize(
    "name", [pytest.param("MHA", marks=pytest.mark.slow), "MQA of 3 heads, partial interleaved RoPE"]
)
def test_new_keys_and_values_lie_in_the_pool_and_nothing_else_changed(name: str) -> None:
    given = case(*KINDS[name])
    before = given.step.pool.float().cpu().numpy()
    given.written()
    found = given.step.pool.float().cpu().numpy()
    np.testing.assert_allclose(found, given.pool_after, rtol=2e-3, atol=2e-3)
    assert 0 < (found != before).any(-1).sum() <= 2 * sum(NEW) * given.step.kind.kv_heads


only_on_a_gpu = pytest.mark.skipif(
    DEVICE == "cpu",
    reason="Triton's interpreter multiplies bfloat16 as integers and rounds float8 wrongly; a GPU is needed",
)


@only_on_a_gpu
def test_bfloat16() -> None:
    given = case(AttentionKind(4, 2, 32, 16), 32, dtype=torch.bfloat16)
    q, out = given.written(), poisoned(given)
    launch.prefill(given.step, q, out, decodes=True)
    assert given.error(out) < 16 * TOLERANCE / 2  # 8 bits of mantissa against 11


@pytest.mark.parametrize("pool_dtype", [torch.int8, pytest.param(torch.float8_e4m3fn, marks=only_on_a_gpu)])
def test_quantized_pools(pool_dtype: torch.dtype) -> None:
    given = case(AttentionKind(4, 2, 32, 16, quantized=True), 32, pool_dtype=pool_dtype)
    q, out = given.written(), poisoned(given)
    scales = torch.stack([given.step.k_scale, given.step.v_scale])[:, None, :, None, None]
    pool = given.step.pool.float() * scales
    # New keys and values are rounded as they are written: to the nearest.
    unit = 0.51 * scales.cpu().numpy() if pool_dtype == torch.int8 else 0.063 * np.abs(given.pool_after) + 1e-3
    assert (np.abs(pool.cpu().numpy() - given.pool_after) <= unit).all()
    # Attention over them is exact: what a half-precision pool of the same numbers gives.
    launch.prefill(given.step, q, out, decodes=False)
    launch.decode(given.step, q, out, 2)
    plain = replace(given.step, kind=replace(given.step.kind, quantized=False), pool=pool.half())
    expected = poisoned(given)
    launch.prefill(plain, q, expected, decodes=True)
    assert worst_row(out, expected) < TOLERANCE


@triton.jit
def unpacked(out, pool, FLOAT8: tl.constexpr):  # type: ignore[no-untyped-def]
    words = tl.arange(0, 128)
    low, high = unpack(tl.load(as_words(pool) + words), FLOAT8)
    tl.store(out + 2 * words, low)
    tl.store(out + 2 * words + 1, high)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_every_byte_is_unpacked_exactly(dtype: torch.dtype) -> None:
    given = torch.arange(256, dtype=torch.uint8).view(dtype)
    out = torch.full((256,), torch.nan, dtype=torch.float16, device=DEVICE)
    unpacked[1,](out, given.to(DEVICE), dtype != torch.int8)
    number = ~given.float().isnan()
    assert number.sum() >= 254
    assert torch.equal(out.float().cpu()[number], given.float()[number])


@pytest.mark.parametrize("splits", [1, 3])
def test_decode_over_a_float8_pool(splits: int) -> None:
    """Nothing is written here, which the interpreter would round wrongly."""
    given = case(
        AttentionKind(4, 2, 40, 16, quantized=True), new=(1, 1), past=(21, 130), pool_dtype=torch.float8_e4m3fn
    )
    step, out, expected = given.step, poisoned(given), poisoned(given)
    launch.decode(step, step.q.contiguous(), out, splits)
    scales = torch.stack([step.k_scale, step.v_scale])[:, None, :, None, None]
    wide = replace(step, kind=replace(step.kind, quantized=False), pool=(step.pool.float() * scales).half())
    launch.decode(wide, step.q.contiguous(), expected, 2)
    assert worst_row(out, expected) < TOLERANCE
    launch.decode(replace(step, v_scale=step.v_scale.flip(0)), step.q.contiguous(), out, splits)
    assert worst_row(out, expected) > 10 * TOLERANCE


def shifted_table(step: launch.Step) -> launch.Step:
    return replace(step, block_table=step.block_table.roll(1, 0))


def shorter(step: launch.Step) -> launch.Step:
    """One key less of each sequence that decodes."""
    decoding = step.query_start.diff() == 1
    return replace(step, kv_len=step.kv_len - (decoding & (step.kv_len > 1)).int())


def other_head(step: launch.Step) -> launch.Step:
    return replace(step, pool=step.pool.flip(2).contiguous())


@pytest.mark.parametrize("spoil", [shifted_table, shorter, pytest.param(other_head, marks=pytest.mark.slow)])
def test_a_wrong_step_is_seen(spoil: Any) -> None:
    given = case(AttentionKind(4, 2, 32, 16), 32)
    q, out = given.written(), poisoned(given)
    wrong = spoil(given.step)
    launch.prefill(wrong, q, out, decodes=False)
    launch.decode(wrong, q, out, 2)
    assert given.error(out) > 10 * TOLERANCE


def test_splits_fill_the_card_and_keep_enough_keys_each() -> None:
    kind = AttentionKind(32, 8, 128, 64)
    assert geometry.decode_splits(kind, 64, 4096, 132) == 1
    assert geometry.decode_splits(kind, 4, 4096, 132) == 8
    assert geometry.decode_splits(kind, 1, 32768, 132) == 33
    assert geometry.decode_splits(kind, 1, 100, 132) == 1
    assert geometry.decode_splits(replace(kind, window=512), 1, 32768, 132) == 2
