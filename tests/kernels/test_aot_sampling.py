"""Sampling from kernels compiled ahead of time: what is launched, on a stand-in for the driver; what comes out, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver, Launch, installed
from fake_kernels import record, uncompiled, values
from test_gpu_sampling import DEVICE, Row, large_rows, normal, wrong_rows

from llmlab.cuda import Device, DeviceBuffer, Stream
from llmlab.errors import EngineError
from llmlab.kernels.compile import compile_sampling, sampling_sources
from llmlab.kernels.sampling import SamplingPointers, TokenSampler

VOCAB = 9000
POINTERS = SamplingPointers(
    **{name: 0x7F00_0000_0000 + (n << 32) for n, name in enumerate(SamplingPointers.__dataclass_fields__)}
)
DRAWN = ["sample_peaks", *6 * ["sample_narrow"], "sample_weigh", "sample_choose"]


class Launched:
    """A sampler whose launches are recorded."""

    def __init__(self, fake: FakeDriver) -> None:
        self.kernels = uncompiled(sampling_sources(VOCAB))
        record(fake, self.kernels)
        self.fake, self.device = fake, Device.open()
        self.sampler = TokenSampler(self.kernels, self.device, VOCAB)

    def enqueue(self, rows: int, *, drawn: bool = True, pointers: SamplingPointers = POINTERS) -> list[Launch]:
        self.fake.launches.clear()
        self.sampler.enqueue(77, pointers, rows=rows, drawn=drawn)
        return self.fake.launches

    def values(self, launch: Launch) -> dict[str, Any]:
        return values(launch, self.kernels)


@pytest.fixture
def launched() -> Iterator[Launched]:
    with installed(FakeDriver()) as fake:
        yield Launched(fake)


def test_a_drawn_step_is_nine_launches_and_a_greedy_one_two(launched: Launched) -> None:
    found = launched.enqueue(5)
    assert [launch.kernel for launch in found] == DRAWN
    assert [launch.grid for launch in found] == [(5, 4, 1)] * 8 + [(5, 1, 1)]
    assert [launch.threads for launch in found] == [128, *[256] * 8]
    assert [launched.values(launch)["step"] for launch in found[1:7]] == [0, 1, 2, 3, 4, 5]
    assert launched.values(found[8])["splits"] == 4
    assert {launch.stream for launch in found} == {77}
    assert [launch.kernel for launch in launched.enqueue(5, drawn=False)] == ["sample_peaks", "sample_choose"]
    assert launched.enqueue(0) == []


def test_every_kernel_gets_the_addresses_that_were_given(launched: Launched) -> None:
    rows = 3
    for launch in launched.enqueue(rows):
        for name, value in launched.values(launch).items():
            if hasattr(POINTERS, name):
                assert value == getattr(POINTERS, name), name


def test_parts_of_scratch_are_aligned_and_lie_side_by_side_inside_what_is_asked_for(launched: Launched) -> None:
    for rows in (1, 3, 256):
        values = {k: v for launch in launched.enqueue(rows) for k, v in launched.values(launch).items()}
        sizes = {"hist": 6 * 1024 * 8, "state": 16 * 8, "parts": 2 * 64 * 4, "first": 64 * 4, "mass": 8 * 8}
        spans = sorted((values[name] - POINTERS.scratch, rows * size) for name, size in sizes.items())
        assert all(start % 16 == 0 for start, _ in spans)
        ends = [start + size for start, size in spans]
        assert [start for start, _ in spans] == [0, *ends[:-1]] and ends[-1] == launched.sampler.scratch_bytes(rows)


def test_nothing_is_allocated_or_waited_for(launched: Launched) -> None:
    before = len(launched.fake.calls)
    launched.enqueue(64)
    assert {name for name, _ in launched.fake.calls[before:]} == {"cuLaunchKernel"}


@pytest.mark.parametrize("name", ["logits", "scratch"])
def test_addresses_that_the_kernels_would_misread_are_refused(launched: Launched, name: str) -> None:
    with pytest.raises(EngineError, match="multiples of 16 bytes"):
        launched.enqueue(1, pointers=replace(POINTERS, **{name: getattr(POINTERS, name) + 4}))
    assert not launched.fake.launches


def test_kernels_of_another_vocabulary_or_type_are_not_taken(launched: Launched) -> None:
    for vocab, dtype in ((VOCAB + 1, "float32"), (VOCAB, "float16")):
        with pytest.raises(EngineError, match=r"no kernel sample_peaks with VOCAB="):
            TokenSampler(launched.kernels, launched.device, vocab, dtype)


@pytest.mark.slow
def test_compiled_kernels_have_the_parameters_that_are_launched() -> None:
    compiled = compile_sampling(VOCAB, [90])
    shapes = [
        {(k.name, str(sorted(k.constants.items())), k.parameters, k.num_warps, k.aligned) for k in kernels.kernels}
        for kernels in (compiled, uncompiled(sampling_sources(VOCAB)))
    ]
    assert shapes[0] == shapes[1]
    assert all(kernel.cubin.startswith(b"\x7fELF") for kernel in compiled.kernels)


def columns(rows: list[Row]) -> dict[str, np.ndarray]:
    kinds = {"temperature": "f4", "top_k": "i4", "top_p": "f4", "min_p": "f4", "uniform": "f4"}
    values = zip(*((r.temperature, r.top_k, r.top_p, r.min_p, r.u) for r in rows), strict=True)
    return {name: np.array(column, kind) for (name, kind), column in zip(kinds.items(), values, strict=True)}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("vocab", "dtype"), [(50257, "float32"), (128256, "float16")])
def test_tokens_are_those_of_the_host(vocab: int, dtype: str) -> None:
    device, stream = Device.open(), Stream()
    major, minor = device.compute_capability
    sampler = TokenSampler(compile_sampling(vocab, [10 * major + minor], dtype), device, vocab, dtype)
    rows = [row._replace(logits=row.logits.astype(dtype)) for row in large_rows(vocab, 24)]
    rows[7] = Row(np.full(vocab, np.nan, dtype))
    given: dict[str, Any] = {**columns(rows), "logits": np.stack([r.logits for r in rows])}
    buffers = {name: DeviceBuffer.of(array) for name, array in given.items()}
    buffers |= {"tokens": DeviceBuffer(4 * len(rows)), "scratch": DeviceBuffer(sampler.scratch_bytes(len(rows)))}
    buffers["scratch"].fill_byte(0xFF, stream)
    pointers = SamplingPointers(**{name: buffer.pointer for name, buffer in buffers.items()})
    sampler.enqueue(stream, pointers, rows=len(rows), drawn=True)  # modules load before a capture
    with stream.capture() as graph:
        sampler.enqueue(stream, pointers, rows=len(rows), drawn=True)
    for shift in range(2):
        others = [r._replace(logits=rows[i].logits) for i, r in enumerate(rows[shift:] + rows[:shift])]
        for name, array in columns(others).items():
            buffers[name].upload(array)
        buffers["tokens"].fill_byte(0x77, stream)
        graph.launch(stream)
        stream.synchronize()
        assert wrong_rows(others, buffers["tokens"].to_numpy(np.int32, (len(rows),)).tolist()) == []
    greedy = [Row(normal(seed, vocab).astype(dtype), temperature=0.0) for seed in range(len(rows))]
    buffers["logits"].upload(np.stack([r.logits for r in greedy]))
    for name, array in columns(greedy).items():
        buffers[name].upload(array)
    sampler.enqueue(stream, pointers, rows=len(rows), drawn=False)
    stream.synchronize()
    assert wrong_rows(greedy, buffers["tokens"].to_numpy(np.int32, (len(rows),)).tolist()) == []
