"""A stand-in for `cuda.bindings.driver` that records what it is asked, hands out addresses, and refuses what it is told to."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

_MAKERS = {
    "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuModuleLoadData": "cuModuleUnload",
    "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy",
    "cuGraphInstantiate": "cuGraphExecDestroy",
    "cuStreamEndCapture": "cuGraphDestroy",
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease",
}
"""What makes something, and what unmakes it: see `FakeDriver.alive`."""


@dataclass
class Launch:
    """What was given to cuLaunchKernel or cuLaunchKernelEx; `words`: the 8 bytes of each parameter, as the driver would read them."""

    kernel: str
    cubin: bytes
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    words: list[bytes]
    early: bool = False


class FakeDriver:
    """`refuse[function] = status` makes that function fail."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="multiprocessors",
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="early")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")

    @staticmethod
    def CUlaunchConfig() -> SimpleNamespace:
        return SimpleNamespace()

    @staticmethod
    def CUlaunchAttribute() -> SimpleNamespace:
        return SimpleNamespace(value=SimpleNamespace())

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.launches: list[Launch] = []
        self.refuse: dict[str, str] = {}
        self.parameters: dict[bytes, int] = {}  # how many parameters a kernel has, by its cubin
        self._cubins: dict[int, bytes] = {}
        self.answers: dict[str, Any] = {
            "cuDeviceGetCount": 1,
            "cuDriverGetVersion": 13000,
            "cuDeviceGetName": b"Fake GPU\0\0",
            "cuEventElapsedTime": 1.5,
            "cuMemGetInfo": (1_000_000_000, 80_000_000_000),
        }
        self._attributes = {"major": capability[0], "minor": capability[1], "multiprocessors": 132}
        self._next = 0x7000_0000_0000
        self._memory: list[Any] = []

    def named(self, function: str) -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name == function]

    def alive(self) -> Counter[str]:
        """How many things of each kind were made and not unmade."""
        made = Counter({maker: len(self.named(maker)) - (maker in self.refuse) for maker in _MAKERS})
        return +Counter({maker: n - len(self.named(_MAKERS[maker])) for maker, n in made.items()})

    def __getattr__(self, function: str) -> Any:
        if not function.startswith("cu"):
            raise AttributeError(function)
        return lambda *arguments: self._call(function, arguments)

    def _call(self, function: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append((function, arguments))
        if function in self.refuse:
            return (IntEnum("CUresult", {self.refuse[function]: 999})(999),)  # type: ignore[misc]
        if function == "cuLaunchKernel":
            self._launch(*arguments)
        if function == "cuLaunchKernelEx":
            config, kernel, *others = arguments
            block = (config.blockDimX, config.blockDimY, config.blockDimZ)
            grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
            self._launch(kernel, *grid, *block, config.sharedMemBytes, config.hStream, *others)
            (attribute,) = config.attrs[: config.numAttrs]
            self.launches[-1].early = bool(
                attribute.id == "early" and attribute.value.programmaticStreamSerializationAllowed
            )
        return (0, *self._results(function, arguments))

    def _results(self, function: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if function in self.answers:
            answer = self.answers[function]
            return answer if isinstance(answer, tuple) else (answer,)
        if function == "cuDeviceGetAttribute":
            return (self._attributes[arguments[0]],)
        if function == "cuModuleGetFunction":
            return ((self._cubins[arguments[0]], arguments[1].decode()),)
        if function == "cuMemHostAlloc":
            self._memory.append(ctypes.create_string_buffer(b"\xff" * arguments[0], arguments[0]))
            return (ctypes.addressof(self._memory[-1]),)
        if function in _MAKERS:
            self._next += 1 << 32
            if function == "cuModuleLoadData":
                self._cubins[self._next] = arguments[0]
            return (self._next,)
        return ()

    def _launch(self, function: tuple[bytes, str], *numbers: int) -> None:
        x, y, z, threads, _, _, shared, stream, pointer, _ = numbers
        cubin, kernel = function
        count = self.parameters.get(cubin, 0)
        addresses = (ctypes.c_uint64 * count).from_address(pointer)
        words = [ctypes.string_at(address, 8) for address in addresses]
        self.launches.append(Launch(kernel, cubin, (x, y, z), threads, shared, stream, words))


@contextmanager
def installed(fake: FakeDriver) -> Iterator[FakeDriver]:
    """`fake` in place of the CUDA driver."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("driver", "device", "module", "stream"):
            patch.setattr(f"llmlab.cuda.{module}.driver", lambda: fake)
        yield fake
