"""The wrapper over the CUDA driver, against a stand-in that records and refuses: no GPU is needed."""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from fake_driver import FakeDriver, installed

from llmlab.cuda import Arguments, Device, DeviceBuffer, Event, Module, PinnedArray, Stream, copy_async
from llmlab.cuda import driver as calls
from llmlab.errors import EngineError, GpuLostError


@pytest.fixture
def fake() -> Iterator[FakeDriver]:
    with installed(FakeDriver()) as driver:
        yield driver


def message(run: Callable[[], object], kind: type[EngineError] = EngineError) -> str:
    with pytest.raises(EngineError) as caught:
        run()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text and len(text) < 250
    return text


def test_a_device_says_what_it_is_and_can_be_used_by_other_threads(fake: FakeDriver) -> None:
    device = Device.open(0)
    assert (device.name, device.compute_capability, device.multiprocessors) == ("Fake GPU", (9, 0), 132)
    assert (device.free_memory, device.total_memory) == (10**9, 80 * 10**9)
    device.use()
    assert len(fake.named("cuCtxSetCurrent")) == 2


def test_a_kernel_is_loaded_once_for_all_layers(fake: FakeDriver) -> None:
    device = Device.open()
    assert device.module(b"one") is device.module(b"one") is not device.module(b"two")
    assert fake.named("cuModuleLoadData") == [(b"one",), (b"two",)]
    function = device.module(b"two").function("f")
    del device
    gc.collect()
    assert fake.alive()["cuModuleLoadData"] == 1, "a kernel's module stays as long as the kernel"
    del function
    gc.collect()
    assert not fake.alive()["cuModuleLoadData"]


def test_a_gpu_that_is_not_there(fake: FakeDriver) -> None:
    assert "GPU 1 is not there: this machine shows 1" in message(lambda: Device.open(1))
    fake.refuse["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    assert "no NVIDIA GPU is visible" in message(Device.open)


def test_a_device_that_fails_while_it_opens_keeps_no_context(fake: FakeDriver) -> None:
    fake.refuse["cuCtxSetCurrent"] = "CUDA_ERROR_ECC_UNCORRECTABLE"
    message(Device.open, GpuLostError)
    assert not fake.alive()


def refusing(problem: Exception) -> Callable[..., object]:
    def function(*_: object) -> object:
        raise problem

    return function


def test_no_driver_and_one_that_is_too_old(fake: FakeDriver) -> None:
    fake.__dict__["cuInit"] = refusing(RuntimeError("Failed to dlopen libcuda.so.1"))
    assert "no NVIDIA driver on this machine (Failed to dlopen libcuda.so.1)" in message(Device.open)
    fake.__dict__["cuInit"] = refusing(RuntimeError('Function "cuInit" not found'))
    assert "the NVIDIA driver has no cuInit: update the NVIDIA driver" in message(Device.open)


def test_out_of_memory_says_what_was_asked_what_is_free_and_what_to_lower(fake: FakeDriver) -> None:
    fake.refuse["cuMemAlloc"] = "CUDA_ERROR_OUT_OF_MEMORY"
    text = message(lambda: DeviceBuffer(4_200_000_000, "the KV pool"))
    assert "4.20 GB for the KV pool was asked and 1.00 GB of 80.00 GB are free: lower the KV pool, max_batch" in text
    fake.refuse["cuMemGetInfo"] = "CUDA_ERROR_INVALID_CONTEXT"
    assert "free" not in message(lambda: DeviceBuffer(1))


@pytest.mark.parametrize("status", sorted(calls._LOST))
def test_a_lost_gpu_is_told_from_other_failures(fake: FakeDriver, status: str) -> None:
    fake.refuse["cuStreamSynchronize"] = status
    stream = Stream()
    assert f"the GPU failed ({status} in cuStreamSynchronize)" in message(stream.synchronize, GpuLostError)


@pytest.mark.parametrize("status", [*calls._REASONS, "CUDA_ERROR_INVALID_VALUE"])
def test_other_failures_are_one_line(fake: FakeDriver, status: str) -> None:
    fake.refuse["cuModuleLoadData"] = status
    assert (calls._REASONS.get(status) or status) in message(lambda: Module(b""))


def test_the_statuses_are_those_of_the_driver() -> None:
    real = pytest.importorskip("cuda.bindings.driver").CUresult
    assert calls._LOST | set(calls._REASONS) | {"CUDA_ERROR_OUT_OF_MEMORY"} <= {status.name for status in real}
    assert not calls._LOST & set(calls._REASONS)


def test_every_function_that_is_called_is_one_of_the_driver() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    with installed(FakeDriver()) as fake:
        device, stream, event = Device.open(), Stream(), Event()
        event.record(stream)
        event.synchronize()
        event.elapsed_ms(event)
        with stream.capture() as graph:
            DeviceBuffer.of(np.ones(3)).fill_byte(1, stream)
        graph.launch(stream)
        device.module(b"").function("f", 1 << 16).launch((1,), 32, Arguments([]), stream)
        DeviceBuffer(8).to_numpy(np.float32, (2,))
        PinnedArray(3, np.int32)
        copy_async(1, 2, 3, stream)
        del device, event, graph, stream
    assert len({name for name, _ in fake.calls}) > 25
    assert not [name for name, _ in fake.calls if not hasattr(real, name)]
    for enum in ("CUdevice_attribute", "CUfunction_attribute", "CUstreamCaptureMode"):
        assert all(hasattr(getattr(real, enum), name) for name in vars(getattr(fake, enum)))


def test_buffers_are_freed_once_also_when_their_copy_fails(fake: FakeDriver) -> None:
    buffer = DeviceBuffer.of(np.arange(6, dtype=np.int32))
    assert fake.named("cuMemAlloc") == [(24,)] and fake.named("cuMemcpyHtoD")[0][2] == 24
    buffer.free()
    buffer.free()
    assert len(fake.named("cuMemFree")) == 1 and not fake.alive()
    fake.refuse["cuMemcpyHtoD"] = "CUDA_ERROR_INVALID_VALUE"
    message(lambda: DeviceBuffer.of(np.arange(6)))
    assert not fake.alive()
    DeviceBuffer(8)  # nobody keeps it
    gc.collect()
    assert not fake.alive()


def test_copies_stay_inside_the_buffer(fake: FakeDriver) -> None:
    buffer = DeviceBuffer(16)
    with pytest.raises(ValueError, match="16 bytes at 8 don't fit into 16"):
        buffer.upload(np.zeros(4, np.float32), 8)
    with pytest.raises(ValueError, match="20 bytes"):
        buffer.to_numpy(np.float32, (5,))
    with pytest.raises(ValueError, match="not contiguous"):
        buffer.upload(np.zeros((2, 4), np.float16)[:, ::2])
    assert not fake.named("cuMemcpyHtoD") and not fake.named("cuMemcpyDtoH")


def test_page_locked_memory_lives_as_long_as_a_view_of_it(fake: FakeDriver) -> None:
    pinned = PinnedArray((2, 3), np.int32)
    row = pinned.array[1]
    assert pinned.array.shape == (2, 3) and not pinned.array.any()
    assert pinned.pointer == pinned.array.ctypes.data and pinned.nbytes == 24
    address = pinned.pointer
    del pinned
    gc.collect()
    row[:] = 7
    assert not fake.named("cuMemFreeHost")
    del row
    gc.collect()
    assert fake.named("cuMemFreeHost") == [(address,)]
    assert PinnedArray(0, np.int32).array.shape == (0,)


def test_a_graph_is_captured_whole_or_not_at_all(fake: FakeDriver) -> None:
    stream = Stream()
    with stream.capture() as graph:
        pass
    assert fake.alive() == {"cuStreamCreate": 1, "cuGraphInstantiate": 1}, "the recording itself is gone"
    graph.launch(stream)
    assert fake.named("cuGraphLaunch")[0][1] == stream.handle
    with pytest.raises(KeyError), stream.capture() as broken:
        raise KeyError
    assert len(fake.named("cuStreamEndCapture")) == 2, "the stream is usable again"
    with pytest.raises(Exception, match="was not captured"):
        broken.launch(stream)
    fake.refuse["cuGraphInstantiate"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(EngineError, match="memory for a captured step"), stream.capture():
        pass
    assert not fake.alive()["cuStreamEndCapture"]


def test_arguments_lie_where_the_driver_reads_them(fake: FakeDriver) -> None:
    fake.parameters[b""] = 4
    arguments = Arguments(["ptr", "i32", "fp32", "i64"])
    function = Module(b"").function("kernel", 100_000)
    assert fake.named("cuFuncSetAttribute") == [((b"", "kernel"), "shared", 100_000)]
    for values in ((0x7FFF_0000_1000, -1, 0.125, 1 << 40), (1, 2, 3.0, 4)):
        arguments.set(*values)
        assert arguments.values() == values
        function.launch((5, 6), 128, arguments, Stream())
    first, second = fake.launches
    assert (first.grid, first.threads, first.shared) == ((5, 6, 1), 128, 100_000)
    assert [struct.unpack(f, w[: struct.calcsize(f)])[0] for f, w in zip("Qifq", first.words, strict=True)] == [
        0x7FFF_0000_1000, -1, 0.125, 1 << 40,
    ]  # fmt: skip
    assert struct.unpack("i4x", second.words[1]) == (2,)
    with pytest.raises(struct.error):
        arguments.set(1, 1 << 31, 0.0, 0)


def test_little_shared_memory_needs_no_attribute(fake: FakeDriver) -> None:
    Module(b"").function("kernel", 48 << 10)
    assert not fake.named("cuFuncSetAttribute")
