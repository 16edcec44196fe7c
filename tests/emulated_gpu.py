"""A GPU on the CPU: the driver's calls on host memory, and launches run by Triton's interpreter from the words that the driver would read.

TRITON_INTERPRET=1 has to be set before the kernels are imported. Reading outside of what is allocated ends the process, as it should.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fake_driver import FakeDriver
from fake_kernels import WORDS, kernel_of, parameters, record

from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.source import KernelSource

_DTYPES = {
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*i8": torch.int8,
    "*i32": torch.int32,
    "*i64": torch.int64,
    "*fp8e4nv": torch.float8_e4m3fn,
}


class EmulatedGpu(FakeDriver):
    """Runs the kernels of these sources; `kernels` is what an engine would have."""

    def __init__(self, sources: Iterable[KernelSource]) -> None:
        super().__init__()
        made = [(kernel_of(source, 90, b"kernel %d" % n), source) for n, source in enumerate(sources)]
        self.kernels = KernelSet(kernel for kernel, _ in made)
        self._sources = {kernel.cubin: source for kernel, source in made}
        record(self, self.kernels)
        self._blocks: dict[int, Any] = {}
        self._recording: list[Callable[[], object]] | None = None
        self._graphs: dict[int, list[Callable[[], object]]] = {}

    def _results(self, function: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if function == "cuMemAlloc":
            block = ctypes.create_string_buffer(arguments[0] + 256)
            address = -(-ctypes.addressof(block) // 256) * 256
            self._blocks[address] = (block, arguments[0])
            return (address,)
        if function == "cuMemFree":
            del self._blocks[arguments[0]]
        elif function in ("cuMemcpyHtoD", "cuMemcpyDtoH"):
            ctypes.memmove(*arguments)
        elif function == "cuMemcpyAsync":
            self._do(lambda: ctypes.memmove(*arguments[:3]))
        elif function == "cuMemsetD8Async":
            self._do(lambda: ctypes.memset(*arguments[:3]))
        elif function == "cuStreamBeginCapture":
            self._recording = []
        elif function == "cuStreamEndCapture":
            (handle,) = super()._results(function, arguments)
            self._graphs[handle], self._recording = self._recording or [], None
            return (handle,)
        elif function == "cuGraphInstantiate":
            (handle,) = super()._results(function, arguments)
            self._graphs[handle] = self._graphs[int(arguments[0])]
            return (handle,)
        elif function == "cuGraphLaunch":
            for run in self._graphs[arguments[0]]:
                run()
        return super()._results(function, arguments)

    def _do(self, work: Callable[[], object]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def _launch(self, function: tuple[bytes, str], *numbers: int) -> None:
        super()._launch(function, *numbers)
        launch = self.launches[-1]
        source = self._sources[launch.cubin]
        self._do(lambda: self._interpret(source, launch.grid, launch.words))

    def _interpret(self, source: KernelSource, grid: tuple[int, ...], words: list[bytes]) -> None:
        module, _, name = source.function.partition(":")
        given: dict[str, Any] = {**source.constants, **dict.fromkeys(source.null)}
        names = parameters(source.function)
        for parameter, word in zip([p for p in names if p not in given], words[:-2], strict=True):
            kind = source.types[parameter]
            if kind.startswith("*"):
                given[parameter] = self._tensor(struct.unpack("Q", word)[0], _DTYPES[kind])
            else:
                (given[parameter],) = struct.unpack("<" + WORDS[kind], word)
        kernel = getattr(importlib.import_module(module), name)
        kernel[grid](**{parameter: given[parameter] for parameter in names})

    def _tensor(self, address: int, dtype: torch.dtype) -> torch.Tensor:
        """All that is allocated from `address` on."""
        base = max(b for b in self._blocks if b <= address)
        count = (base + self._blocks[base][1] - address) // dtype.itemsize
        assert count > 0, f"{address:#x} was not allocated"
        return torch.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), dtype=dtype)
