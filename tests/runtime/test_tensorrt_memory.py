"""Where tensors and KV blocks lie, and what steps are padded to: nothing here needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import installed
from host_driver import HostDriver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab.cuda import Device
from llmlab.errors import EngineError, InputError
from llmlab.runtime.backends.tensorrt.buckets import bucket_for, decode_buckets, round_down, table_width
from llmlab.runtime.backends.tensorrt.memory import ALIGN, KVPool, block_bytes, lifetimes, place, pool_blocks
from llmlab.runtime.manifest import KVLayout
from llmlab.runtime.program import Attend, Program, RunPlan, TensorSpec, View

spans = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: (min(pair), max(pair)))
tensors = st.lists(st.tuples(st.integers(1, 5000), spans), max_size=20)
STEADY = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))  # machines may be busy


@STEADY
@given(tensors)
def test_tensors_that_live_together_never_overlap(some: list[tuple[int, tuple[int, int]]]) -> None:
    sizes = {f"t{i}": size for i, (size, _) in enumerate(some)}
    lives = {f"t{i}": span for i, (_, span) in enumerate(some)}
    offsets, total = place(sizes, lives)
    assert all(at % ALIGN == 0 and at + sizes[name] <= total for name, at in offsets.items())
    for a in sizes:
        for b in sizes:
            together = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            if a < b and together:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
    most = max(sum(-(-sizes[n] // ALIGN) * ALIGN for n in sizes if lives[n][0] <= t <= lives[n][1]) for t in range(13))
    assert total >= most


def test_a_chain_needs_two_tensors() -> None:
    sizes = dict.fromkeys("abcdef", 1000)
    lives = {name: (i, i + 1) for i, name in enumerate("abcdef")}
    assert place(sizes, lives)[1] == 2 * 1024


def program(*steps: Any, **specs: TensorSpec) -> Program:
    return Program(specs, steps)


def test_lifetimes_of_a_layer() -> None:
    wide = TensorSpec("float16", 48)
    attend = Attend(0, View("qkv"), View("qkv", 16), View("qkv", 32), "att", 1, 1, 16, 1.0)
    steps = (
        RunPlan("a.plan", {"input_ids": "input_ids"}, {"qkv": "qkv", "x": "x"}),
        attend,
        RunPlan("b.plan", {"att": "att", "x": "x", "logits_index": "logits_index"}, {"logits": "logits"}),
    )
    specs = {"qkv": wide, "x": wide, "att": TensorSpec("float16", 16), "logits": TensorSpec("float32", 9, "N")}
    found = lifetimes(program(*steps, **specs))
    assert found == {"qkv": (0, 1), "x": (0, 2), "att": (1, 2), "logits": (2, 3)}
    with pytest.raises(EngineError, match=r"reads qkv in step 0 \(\) before anything made it"):
        lifetimes(program(*steps[1:], **specs))
    with pytest.raises(EngineError, match="makes qkv a second time in step 1"):
        lifetimes(program(steps[0], *steps, **specs))
    with pytest.raises(EngineError, match="makes no logits"):
        lifetimes(program(*steps[:2], **specs))


@STEADY
@given(st.integers(1, 300), st.data())
def test_buckets_hold_what_they_are_for(most: int, data: Any) -> None:
    buckets = decode_buckets(most)
    assert list(buckets) == sorted(set(buckets)) and buckets[-1] == most and buckets[0] == 1
    batch = data.draw(st.integers(1, most))
    own = sorted(data.draw(st.sets(st.integers(1, most), max_size=3)))
    bucket = bucket_for(batch, buckets, own)
    assert batch <= bucket <= most and bucket in (*buckets, *own)
    assert bucket_for(batch, buckets) - batch < max(4, batch)


def test_a_bucket_with_kernels_of_its_own_is_preferred_where_padding_is_free() -> None:
    buckets = decode_buckets(256)
    assert bucket_for(33, buckets, (1, 64)) == 64
    assert bucket_for(33, buckets, (1, 128)) == 48
    assert bucket_for(100, buckets, (1, 64)) == 112
    assert bucket_for(1, buckets, (1, 64)) == 1


def test_splits_and_widths_are_powers_of_two() -> None:
    assert [round_down(n) for n in (0, 1, 2, 3, 33, 64)] == [0, 1, 2, 2, 32, 64]
    assert [table_width(n, 20) for n in (0, 1, 2, 3, 9, 17, 20)] == [1, 1, 2, 4, 16, 20, 20]


LAYOUT = KVLayout("paged", "float16", 16, ((2, 8), (1, 4)))


def test_spans_of_a_block_are_where_the_kernels_look() -> None:
    with installed(HostDriver()) as driver:
        Device.open()
        pool = KVPool(LAYOUT, 5)
        assert block_bytes(LAYOUT) == 2 * (2 * 8 + 4) * 16 * 2
        for tokens in (1, 7, 16):
            touched = np.zeros(pool.nbytes // 2, bool)
            for at, nbytes in pool.spans(3, tokens):
                first = (at - pool.addresses[0]) // 2
                assert not touched[first : first + nbytes // 2].any()
                touched[first : first + nbytes // 2] = True
            expected = np.zeros(pool.nbytes // 2, bool)
            for address, (heads, dim) in zip(pool.addresses, LAYOUT.layers, strict=True):
                first = (address - pool.addresses[0]) // 2
                size = 2 * 5 * heads * 16 * dim
                expected[first : first + size].reshape(2, 5, heads, 16, dim)[:, 3, :, :tokens] = True
            assert (touched == expected).all()
        pool.free()
        assert driver.in_use == 0


@pytest.mark.parametrize(
    ("given_size", "error", "message"),
    [
        ({"kv_blocks": 0}, InputError, "kv_blocks is 0, expected an integer from 1 to 16777216"),
        ({"kv_blocks": True}, InputError, "kv_blocks is True, expected an integer from 1 to"),
        ({"kv_memory_fraction": 1.5}, InputError, "kv_memory_fraction is 1.5, expected a number above 0, at most 1"),
        ({"kv_memory_fraction": float("nan")}, InputError, "kv_memory_fraction is nan, expected"),
        ({"kv_blocks": 1, "kv_memory_fraction": 0.5}, InputError, "are both given, expected one of them"),
        (
            {"kv_blocks": 1 << 20},
            EngineError,
            "out of GPU memory: 1048576 KV blocks take 1.34 GB and 1.00 GB are free: lower",
        ),
        ({"kv_memory_fraction": 1e-7}, EngineError, "out of GPU memory: one KV block takes 0.000 GB and 0% of 1.00 GB"),
    ],
)
def test_pools_that_cannot_be(given_size: dict[str, Any], error: type[Exception], message: str) -> None:
    device: Any = SimpleNamespace(free_memory=1_000_000_000)
    sizes = {"kv_blocks": None, "kv_memory_fraction": None, **given_size}
    with pytest.raises(error, match=message):
        pool_blocks(LAYOUT, device, 10, **sizes)


def test_pools_take_what_was_asked() -> None:
    device: Any = SimpleNamespace(free_memory=1_000_000_000)
    assert pool_blocks(LAYOUT, device, 10, kv_blocks=77, kv_memory_fraction=None) == 77
    assert pool_blocks(LAYOUT, device, 10, kv_blocks=None, kv_memory_fraction=None) == 10
    assert pool_blocks(LAYOUT, device, 10, 4, kv_blocks=None, kv_memory_fraction=0.5) == 4
    with pytest.raises(InputError, match="kv_blocks is 5, expected an integer from 1 to 4"):
        pool_blocks(LAYOUT, device, 10, 4, kv_blocks=5, kv_memory_fraction=None)
    assert pool_blocks(LAYOUT, device, 10, kv_blocks=None, kv_memory_fraction=0.5) == 500_000_000 // 1280
    assert pool_blocks(LAYOUT, device, 1 << 30, kv_blocks=None, kv_memory_fraction=None) == 900_000_000 // 1280
