"""The wrapper over the CUDA driver on a real GPU: what the stand-in can't show. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmlab.cuda import Arguments, Device, DeviceBuffer, Event, Function, PinnedArray, Stream, copy_async
from llmlab.errors import EngineError, LlmlabError
from llmlab.kernels.compile import compile_kernels
from llmlab.kernels.source import KernelSource

ADD = """
import triton
import triton.language as tl

@triton.jit
def add(x, amount, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + amount, mask=i < n)
"""
TYPES = ("ptr", "fp32", "i32", "ptr", "ptr")


@pytest.fixture(scope="module")
def device() -> Device:
    try:
        return Device.open()
    except LlmlabError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def add(device: Device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Function]:
    folder = tmp_path_factory.mktemp("add")
    (folder / "adding.py").write_text(ADD)
    major, minor = device.compute_capability
    source = KernelSource("adding:add", {"x": "*fp32", "amount": "fp32", "n": "i32"}, {"BLOCK": 128}, {"num_warps": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        (kernel,) = compile_kernels([source], [10 * major + minor]).kernels
    (folder / "cubin").write_bytes(kernel.cubin)
    yield device.module(kernel.cubin).function("add")


def test_copies_a_kernel_and_its_time(device: Device, add: Function) -> None:
    stream, start, end = Stream(), Event(), Event()
    pinned, back = PinnedArray(1000, np.float32), PinnedArray(1000, np.float32)
    pinned.array[:] = np.arange(1000)
    buffer = DeviceBuffer(pinned.nbytes)
    buffer.fill_byte(0xFF, stream)
    arguments = Arguments(TYPES)
    start.record(stream)
    copy_async(buffer.pointer, pinned.pointer, pinned.nbytes, stream)
    for amount in (0.5, 0.25):
        arguments.set(buffer.pointer, amount, 999, 0, 0)
        add.launch((8,), 128, arguments, stream)
    copy_async(back.pointer, buffer.pointer, back.nbytes, stream)
    end.record(stream)
    end.synchronize()
    assert 0 < end.elapsed_ms(start) < 1000
    np.testing.assert_array_equal(back.array, np.arange(1000) + np.append(np.full(999, 0.75), 0))
    np.testing.assert_array_equal(buffer.to_numpy(np.float32, (1000,)), back.array)
    assert 0 < device.free_memory < device.total_memory


def test_a_graph_runs_what_was_captured_each_time(device: Device, add: Function) -> None:
    stream, buffer, arguments = Stream(), DeviceBuffer.of(np.zeros(10, np.float32)), Arguments(TYPES)
    arguments.set(buffer.pointer, 1.0, 10, 0, 0)
    with stream.capture() as graph:
        add.launch((1,), 128, arguments, stream)
        arguments.set(buffer.pointer, 10.0, 5, 0, 0)
        add.launch((1,), 128, arguments, stream)
    stream.synchronize()
    assert not buffer.to_numpy(np.float32, (10,)).any(), "capturing runs nothing"
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    assert buffer.to_numpy(np.float32, (10,)).tolist() == [33.0] * 5 + [3.0] * 5


def test_more_memory_than_there_is(device: Device) -> None:
    before = device.free_memory
    with pytest.raises(EngineError, match=r"GB for the KV pool was asked and .* GB of .* GB are free: lower") as caught:
        DeviceBuffer(4 * device.total_memory, "the KV pool")
    assert "\n" not in str(caught.value)
    DeviceBuffer(1 << 28).free()
    assert abs(device.free_memory - before) < 1 << 27, "what was freed is free"


def test_a_cubin_that_is_none(device: Device) -> None:
    with pytest.raises(EngineError, match="a kernel's file is damaged"):
        device.module(b"\x7fELF" + bytes(100))


LOST = """
import sys
from pathlib import Path
from llmlab.cuda import Arguments, Device, DeviceBuffer, Stream
from llmlab.errors import GpuLostError

device, stream, arguments = Device.open(), Stream(), Arguments(%r)
add = device.module(Path(sys.argv[1]).read_bytes()).function("add")
arguments.set(0x10, 1.0, 10, 0, 0)
add.launch((1,), 128, arguments, stream)
for attempt in (stream.synchronize, lambda: DeviceBuffer(1)):
    try:
        attempt()
    except GpuLostError as problem:
        print(problem)
"""


def test_a_gpu_that_fails_says_so_and_nothing_hangs(add: Function, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own: nothing more runs in that one."""
    cubin = next(Path(tmp_path_factory.getbasetemp()).glob("add*/cubin"))
    command = [sys.executable, "-c", LOST % (TYPES,), str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stdout + done.stderr
    assert all(line.startswith("the GPU failed (CUDA_ERROR_") for line in lines)
