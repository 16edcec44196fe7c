"""What attention launches, on a stand-in for the CUDA driver: grids, the values of all parameters, and nothing besides."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_driver import FakeDriver, Launch, installed
from fake_kernels import record, uncompiled, values

from llmlab.cuda import Device
from llmlab.errors import EngineError
from llmlab.kernels.attention import AttentionPointers, PagedAttention, TokenLocator, scratch_bytes
from llmlab.kernels.compile import attention_sources
from llmlab.kernels.gpu import geometry
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant

SMALL = AttentionVariant(AttentionKind(4, 2, 16, 16, window=40, softcap=3.0, sinks=True), rotary=16)
POINTERS = AttentionPointers(
    **{
        name: 0x7F00_0000_0000 + 4096 * n
        for n, name in enumerate(AttentionPointers.__dataclass_fields__)
        if not name.endswith("_stride")
    },
    q_stride=128,
    k_stride=144,
    v_stride=160,
)


class Launched:
    """A layer of SMALL whose launches are recorded."""

    def __init__(self, fake: FakeDriver) -> None:
        self.fake, self.kernels = fake, (kernels := uncompiled(attention_sources(SMALL)))
        record(fake, kernels)
        device = Device.open()
        self.locator = TokenLocator(kernels, device, SMALL.kind.block_size)
        self.layer = PagedAttention(kernels, device, SMALL, 0.25)

    def enqueue(self, **changed: Any) -> list[Launch]:
        given = {"tokens": 300, "batch": 5, "decode": False, "splits": 3, "table_stride": 7, "blocks": 9}
        self.fake.launches.clear()
        self.layer.enqueue(77, changed.pop("pointers", POINTERS), **{**given, **changed})
        return self.fake.launches

    def values(self, launch: Launch) -> dict[str, Any]:
        return values(launch, self.kernels)


@pytest.fixture
def launched() -> Iterator[Launched]:
    with installed(FakeDriver()) as fake:
        yield Launched(fake)


STEP = {name: getattr(POINTERS, name) for name in ("query_start", "kv_len", "block_table")}
ATTEND = {
    **STEP,
    "q": POINTERS.q_scratch,
    "q_stride": 64,
    "pool": POINTERS.pool,
    "pool_half": 9 * 2 * 16 * 16,
    "table_stride": 7,
    "scale": 0.25,
    "sinks": POINTERS.sinks,
}
WRITE = {
    **{name: getattr(POINTERS, name) for name in ("q", "k", "v", "q_stride", "k_stride", "v_stride", "pool", "slots")},
    **{name: getattr(POINTERS, name) for name in ("position_ids", "cos", "sin")},
    "q_out": POINTERS.q_scratch,
    "pool_half": 9 * 2 * 16 * 16,
}
PARTS = {"partial": POINTERS.partial, "partial_lse": POINTERS.partial_lse, "splits": 3}


def test_a_mixed_step_writes_prefills_decodes_and_merges(launched: Launched) -> None:
    found = launched.enqueue()
    assert [launch.kernel for launch in found] == ["rope_and_write", "paged_prefill", "paged_decode", "merge_splits"]
    rows = 128 // SMALL.kind.group
    assert [launch.grid for launch in found] == [(300, 2, 1), (300 // rows + 5, 2, 1), (5, 2, 3), (5, 4, 1)]
    assert {launch.stream for launch in found} == {77}
    assert [launch.threads for launch in found] == [32, 256, 128, 128] and found[1].shared == 100_000
    attend = {**ATTEND, "out": POINTERS.out}
    assert launched.values(found[0]) == WRITE
    assert launched.values(found[1]) == {**attend, "num_seqs": 5}
    assert launched.values(found[2]) == {**attend, **PARTS}
    merged = {"query_start": POINTERS.query_start, "sinks": POINTERS.sinks, "out": POINTERS.out}
    assert launched.values(found[3]) == {**merged, **PARTS}


def test_a_decode_step_has_no_prefill_and_without_splits_no_merge(launched: Launched) -> None:
    names = [launch.kernel for launch in launched.enqueue(decode=True, tokens=5)]
    assert names == ["rope_and_write", "paged_decode", "merge_splits"]
    write, attend = launched.enqueue(decode=True, tokens=5, splits=1)
    assert write.grid == (5, 2, 1) and attend.grid == (5, 2, 1)
    assert launched.values(attend) == {**ATTEND, "out": POINTERS.out}
    assert [launch.kernel for launch in launched.enqueue(splits=0)] == ["rope_and_write", "paged_prefill"]


def test_more_splits_than_are_merged_are_refused(launched: Launched) -> None:
    assert launched.enqueue(splits=64)
    with pytest.raises(ValueError, match="65 splits, more than the 64"):
        launched.enqueue(splits=65)
    assert not launched.fake.launches


def test_few_new_tokens_a_sequence_get_small_tiles(launched: Launched) -> None:
    small, large = launched.enqueue(tokens=10)[1], launched.enqueue(tokens=300)[1]
    assert small.grid[0] == 10 // 8 + 5 and large.grid[0] == 300 // 64 + 5


def test_nothing_is_allocated_or_waited_for(launched: Launched) -> None:
    before = len(launched.fake.calls)
    launched.enqueue()
    launched.locator.enqueue(7, slots=1, query_start=2, kv_len=3, block_table=4, tokens=300, batch=5, table_stride=7)
    assert {name for name, _ in launched.fake.calls[before:]} == {"cuLaunchKernel", "cuMemsetD8Async"}


def test_slots_are_minus_one_before_they_are_found(launched: Launched) -> None:
    launched.fake.calls.clear()
    launched.fake.launches.clear()
    launched.locator.enqueue(
        7, slots=1 << 40, query_start=2, kv_len=3, block_table=4, tokens=300, batch=5, table_stride=6
    )
    assert [name for name, _ in launched.fake.calls] == ["cuMemsetD8Async", "cuLaunchKernel"]
    assert launched.fake.calls[0][1] == (1 << 40, 0xFF, 8 * 300, 7)
    (found,) = launched.fake.launches
    wanted = {"slots": 1 << 40, "query_start": 2, "kv_len": 3, "block_table": 4, "table_stride": 6}
    assert (found.grid, launched.values(found)) == ((5, 1, 1), wanted)


@pytest.mark.parametrize("changed", [{"q": POINTERS.q + 8}, {"k_stride": 72}, {"partial": POINTERS.partial + 4}])
def test_tensors_that_the_kernels_would_misread_are_refused(launched: Launched, changed: dict[str, int]) -> None:
    with pytest.raises(EngineError, match="multiples of 16 bytes"):
        launched.enqueue(pointers=replace(POINTERS, **changed))
    assert not launched.fake.launches


def test_a_gpu_that_the_engine_was_not_built_for() -> None:
    with (
        installed(FakeDriver((8, 6))),
        pytest.raises(EngineError, match=r"no kernels for this GPU \(sm_86\), only for sm_90"),
    ):
        PagedAttention(uncompiled(attention_sources(SMALL)), Device.open(), SMALL, 1.0)


def test_scratch_holds_every_split_that_is_chosen() -> None:
    kind = AttentionKind(32, 8, 128, 64)
    need = scratch_bytes(kind, 2048, 64, 132)
    assert need.q == 2048 * 32 * 128 * 2 and need.slots == 2048 * 8
    assert need.partial == need.partial_lse * 128
    for batch in range(1, 65):
        splits = geometry.decode_splits(kind, batch, 1 << 20, 132)
        assert splits == 1 or batch * splits * 32 * 4 <= need.partial_lse
    assert scratch_bytes(kind, 1, 64, 1).partial == 0, "a card so small never splits"


def test_nothing_that_runs_an_engine_needs_torch_triton_or_onnx() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'triton', 'onnx', 'onnxruntime')))\n"
        "import llmlab.cuda, llmlab.kernels.attention, llmlab.kernels.binaries"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
