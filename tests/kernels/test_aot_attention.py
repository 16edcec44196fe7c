"""Attention launched on raw pointers against the NumPy reference: kernels compiled ahead of time where there is a GPU, else the same launches emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emulated_gpu import EmulatedGpu
from fake_driver import installed
from test_gpu_attention import DEVICE, KINDS, NEW, TOLERANCE, Case, case, only_on_a_gpu, worst_row

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.kernels.attention import AttentionPointers, PagedAttention, TokenLocator, scratch_bytes
from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import attention_sources, compile_attention
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant
from llmlab.kernels.reference import paged_attention, rope

PRECISIONS = {
    "bfloat16": AttentionVariant(AttentionKind(4, 2, 32, 16), "bfloat16", "bfloat16", 32),
    "int8 pool": AttentionVariant(AttentionKind(4, 2, 32, 16, quantized=True), "float16", "int8", 32),
    "fp8 pool": AttentionVariant(AttentionKind(4, 2, 32, 16, quantized=True), "float16", "float8_e4m3fn", 32),
}
VARIANTS = {
    **{name: AttentionVariant(kind, rotary=rotary, interleaved=turn) for name, (kind, rotary, turn) in KINDS.items()},
    **PRECISIONS,
}


class Gpu:
    """A GPU, kernels and a stream."""

    def __init__(self, kernels: Callable[[Device], KernelSet]) -> None:
        self.device = Device.open()
        self.stream = Stream()
        self.kernels = kernels(self.device)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    if DEVICE == "cpu":
        sources = (source for variant in VARIANTS.values() for source in attention_sources(variant))
        with installed(EmulatedGpu(sources)) as emulated:
            yield Gpu(lambda device: emulated.kernels)
        return

    def compiled(device: Device) -> KernelSet:
        major, minor = device.compute_capability
        folder = tmp_path_factory.mktemp("kernels")
        compile_attention(VARIANTS.values(), [10 * major + minor]).write(folder)
        return KernelSet.read(folder)

    yield Gpu(compiled)


def few(values: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of which only some are run on every CPU, where they take seconds each."""
    return [v if DEVICE == "cuda" or v in always else pytest.param(v, marks=pytest.mark.slow) for v in values]


def as_bytes(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


class Bucket:
    """Device memory for steps of up to `tokens` rows and `batch` sequences of one variant, poisoned, and its launches.

    Whatever a step doesn't fill is poison: NaN in tensors, blocks far outside the pool in tables, and rows of no sequence.
    """

    def __init__(self, gpu: Gpu, name: str, scale: float, tokens: int, batch: int, blocks: int, table: int) -> None:
        self.gpu, self.variant = gpu, VARIANTS[name]
        self.tokens, self.batch, self.blocks, self.table = tokens, batch, blocks, table
        kind = self.variant.kind
        self.dtype, self.kv_dtype = (getattr(torch, n) for n in (self.variant.dtype, self.variant.kv_dtype))
        self.widths = [kind.num_heads * kind.head_dim] + 2 * [kind.kv_heads * kind.head_dim]
        self.pool_shape = (2, blocks, kind.kv_heads, kind.block_size, kind.head_dim)
        need = scratch_bytes(kind, tokens, batch, gpu.device.multiprocessors)
        parts = 4 * batch * kind.num_heads * 8
        sizes = {
            "packed": tokens * sum(self.widths) * 2,
            "out": tokens * self.widths[0] * 2,
            "pool": int(np.prod(self.pool_shape)) * self.kv_dtype.itemsize,
            "query_start": 4 * (batch + 1),
            "kv_len": 4 * batch,
            "block_table": 4 * batch * table,
            "position_ids": 4 * tokens,
            "q_scratch": need.q,
            "slots": need.slots,
            "partial": max(need.partial, parts * kind.head_dim),
            "partial_lse": max(need.partial_lse, parts),
        }
        self.buffers = {n: DeviceBuffer(size, n) for n, size in sizes.items()}
        self.locator = TokenLocator(gpu.kernels, gpu.device, kind.block_size)
        self.layer = PagedAttention(gpu.kernels, gpu.device, self.variant, scale)
        self.tables: dict[str, DeviceBuffer] = {}

    def load(self, given: Case) -> None:
        """Put a step into the buffers, poison around it."""
        step, kind = given.step, self.variant.kind
        for name in ("packed", "out", "q_scratch", "partial", "partial_lse", "query_start", "kv_len", "block_table"):
            self.buffers[name].fill_byte(0xFF, self.gpu.stream)
        self.buffers["position_ids"].fill_byte(0x7E, self.gpu.stream)
        self.gpu.stream.synchronize()
        batch = len(step.kv_len)
        start = np.full(self.batch + 1, int(step.query_start[-1]), np.int32)
        start[: batch + 1] = step.query_start.cpu().numpy()
        lines = np.full((batch, self.table), 1 << 30, np.int32)
        given_table = step.block_table.cpu().numpy()[:, : self.table]
        lines[:, : given_table.shape[1]] = given_table
        pool = torch.zeros(self.pool_shape).to(self.kv_dtype)
        pool[:, : step.pool.shape[1]] = step.pool.cpu()
        packed = torch.cat([t.cpu() for t in (step.q, step.k, step.v)], 1)
        for name, array in {
            "packed": as_bytes(packed),
            "pool": as_bytes(pool),
            "query_start": start,
            "kv_len": step.kv_len.cpu().numpy(),
            "block_table": lines,
            "position_ids": step.position_ids.cpu().numpy().astype(np.int32),
        }.items():
            self.buffers[name].upload(array)
        for name in ("cos", "sin", "alibi_slopes", "sinks", "k_scale", "v_scale"):
            tensor = getattr(step, name)
            if tensor is None or (name.endswith("_scale") and not kind.quantized):
                continue
            array = tensor.float().cpu().numpy()
            if name in self.tables:  # a captured graph reads it at this address
                self.tables[name].upload(array)
            else:
                self.tables[name] = DeviceBuffer.of(array, name)

    def enqueue(self, *, decode: bool, splits: int) -> None:
        at = {name: buffer.pointer for name, buffer in self.buffers.items()}
        packed, width = at.pop("packed"), sum(self.widths)
        q, k, v = (packed + 2 * offset for offset in np.cumsum([0, *self.widths[:2]]).tolist())
        pointers = AttentionPointers(
            q=q, k=k, v=v, q_stride=width, k_stride=width, v_stride=width, **at,
            **{name: buffer.pointer for name, buffer in self.tables.items()},
        )  # fmt: skip
        size = {"tokens": self.tokens, "batch": self.batch, "table_stride": self.table}
        ints = {name: at[name] for name in ("slots", "query_start", "kv_len", "block_table")}
        self.locator.enqueue(self.gpu.stream, **ints, **size)
        self.layer.enqueue(self.gpu.stream.handle, pointers, **size, decode=decode, splits=splits, blocks=self.blocks)

    def out(self) -> Any:
        self.gpu.stream.synchronize()
        raw = self.buffers["out"].to_numpy(np.int16, (self.tokens, self.widths[0]))
        return torch.from_numpy(raw).view(self.dtype).float().numpy()

    def pool(self) -> Any:
        raw = self.buffers["pool"].to_numpy(np.uint8, (int(np.prod(self.pool_shape)) * self.kv_dtype.itemsize,))
        return torch.from_numpy(raw).view(self.kv_dtype).float().numpy().reshape(self.pool_shape)


def bucket_for(gpu: Gpu, name: str, given: Case, tokens: int = 3, batch: int = 2) -> Bucket:
    """Larger than the step by so many rows and sequences."""
    step = given.step
    table = step.block_table.shape[1] - 1  # its last column is never used
    size = (len(step.q) + tokens, len(step.kv_len) + batch, step.pool.shape[1], table)
    bucket = Bucket(gpu, name, step.scale, *size)
    bucket.load(given)
    return bucket


def case_of(name: str, **shape: Any) -> Case:
    variant = VARIANTS[name]
    pool = getattr(torch, variant.kv_dtype) if variant.kind.quantized else None
    return case(
        variant.kind, variant.rotary, variant.interleaved, dtype=getattr(torch, variant.dtype), pool_dtype=pool, **shape
    )


@pytest.mark.parametrize("splits", few([1, 3], 3))
@pytest.mark.parametrize(
    "name", [*few(KINDS, "window wider than a tile of keys, sinks"), pytest.param("bfloat16", marks=only_on_a_gpu)]
)
def test_a_mixed_step_equals_the_reference(gpu: Gpu, name: str, splits: int) -> None:
    given = case_of(name)
    bucket = bucket_for(gpu, name, given)
    bucket.enqueue(decode=False, splits=splits)
    out, rows = bucket.out(), sum(NEW)
    tolerance = TOLERANCE * (8 if name == "bfloat16" else 1)  # 8 bits of mantissa against 11
    assert worst_row(out[:rows], given.expected) < tolerance
    assert np.isnan(out[rows:]).all(), "rows of no sequence were written"
    np.testing.assert_allclose(bucket.pool(), given.pool_after, rtol=tolerance, atol=tolerance)
    before = given.step.pool.float().cpu().numpy()
    assert 0 < (bucket.pool() != before).any(-1).sum() <= 2 * rows * given.step.kind.kv_heads


# One-token prompts, a token that fills its block, one that starts a new one, and a sequence as long as its table.
EDGES = {"new": (1, 1, 1, 1, 1), "past": (0, 15, 16, 31, 95)}


@pytest.mark.parametrize("name", few(KINDS))
def test_decodes_at_the_edges_of_blocks(gpu: Gpu, name: str) -> None:
    given = case_of(name, **EDGES)
    for splits in (1, 2, 7):
        bucket = bucket_for(gpu, name, given)
        bucket.enqueue(decode=True, splits=splits)
        assert worst_row(bucket.out()[:5], given.expected) < TOLERANCE


@pytest.mark.parametrize("shape", few([((16,), (0,)), ((1, 1), (0, 0)), ((32, 16), (0, 16)), ((3, 80), (93, 16))]))
def test_prefills_at_the_edges_of_blocks(gpu: Gpu, shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    new, past = shape
    given = case_of("GQA, RoPE", new=new, past=past)
    bucket = bucket_for(gpu, "GQA, RoPE", given, tokens=0, batch=0)
    bucket.enqueue(decode=False, splits=1)
    assert worst_row(bucket.out(), given.expected) < TOLERANCE


@pytest.mark.parametrize("splits", few([1, 2, 4], 2))
@pytest.mark.parametrize("name", few(KINDS, "window wider than a tile of keys, sinks"))
def test_one_captured_bucket_serves_steps_of_other_lengths(gpu: Gpu, name: str, splits: int) -> None:
    bucket = Bucket(gpu, name, VARIANTS[name].kind.head_dim ** -0.5, tokens=8, batch=8, blocks=64, table=9)
    bucket.load(case_of(name, **EDGES))
    with gpu.stream.capture() as graph:
        bucket.enqueue(decode=True, splits=splits)
    assert np.isnan(bucket.out()).all(), "capturing runs nothing"
    for seed, past in enumerate([(0, 15, 16, 31, 95), (120,), (3, 0, 127, 64, 1, 2, 90, 33), (7, 7)]):
        given = case_of(name, new=(1,) * len(past), past=past, seed=seed)
        bucket.load(given)
        graph.launch(gpu.stream)
        out = bucket.out()
        assert worst_row(out[: len(past)], given.expected) < TOLERANCE
        assert np.isnan(out[len(past) :]).all()


@pytest.mark.parametrize("name", [*few(["int8 pool"]), pytest.param("fp8 pool", marks=only_on_a_gpu)])
def test_quantized_pools(gpu: Gpu, name: str) -> None:
    given = case_of(name)
    bucket = bucket_for(gpu, name, given)
    bucket.enqueue(decode=False, splits=2)
    scales = torch.stack([given.step.k_scale, given.step.v_scale])[:, None, :, None, None].cpu().numpy()
    pool = bucket.pool() * scales
    unit = 0.51 * scales if name == "int8 pool" else 0.063 * np.abs(given.pool_after) + 1e-3
    assert (np.abs(pool - given.pool_after) <= unit).all(), "new keys and values are rounded to the nearest"
    # Attention over it: what the reference says of keys and values that are those numbers, the new ones among them.
    step, rows = given.step, sum(NEW)
    ints = [getattr(step, n).cpu().numpy() for n in ("query_start", "kv_len", "block_table", "position_ids")]
    at = ints[3]
    of = np.repeat(np.arange(len(NEW)), NEW)
    k, v = (half[ints[2][of, at // 16], :, at % 16].reshape(rows, -1) for half in pool)
    q = step.q.float().cpu().numpy().reshape(rows, 4, 32)
    turned = rope(q, at, step.cos.cpu().numpy(), step.sin.cpu().numpy()).reshape(rows, -1)
    heads = {"num_heads": 4, "kv_num_heads": 2, "head_dim": 32, "scale": step.scale}
    expected, _ = paged_attention(turned, k, v, pool, *ints, **heads)
    assert worst_row(bucket.out()[:rows], expected) < TOLERANCE


@pytest.mark.parametrize("spoil", few(["block_table", "kv_len", "position_ids"], "position_ids"))
def test_a_wrong_step_is_seen(gpu: Gpu, spoil: str) -> None:
    name = "window wider than a tile of keys, sinks"
    given = case_of(name)
    wrong = getattr(given.step, spoil)
    if spoil == "block_table":
        wrong = wrong.roll(1, 0).clamp(min=0)
    else:
        wrong = wrong + 1 if spoil == "position_ids" else wrong - (wrong > 20).int()
    bucket = bucket_for(gpu, name, replace(given, step=replace(given.step, **{spoil: wrong})))
    bucket.enqueue(decode=False, splits=2)
    assert worst_row(bucket.out()[: sum(NEW)], given.expected) > 10 * TOLERANCE
