"""Compiled kernels (cubins) and their launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, SupportsInt

import numpy as np

from llmlab.cuda.driver import Owned, call, driver

_PACKED = {"ptr": "Q", "i64": "q", "i32": "i4x", "fp32": "f4x"}
_SHARED_WITHOUT_ASKING = 48 << 10  # bytes a block may have before its kernel's limit is raised


class Arguments:
    """Values of a kernel's parameters where the driver reads them. They are read at the launch, so one set serves many.

    `types`: ptr, i64, i32 or fp32 for each parameter, in order.
    """

    def __init__(self, types: Sequence[str]) -> None:
        values = np.zeros(len(types), np.uint64)
        self._values = values.data
        self._layout = struct.Struct("<" + "".join(_PACKED[t] for t in types))
        self._addresses = np.uint64(values.ctypes.data) + 8 * np.arange(len(types), dtype=np.uint64)
        self.pointer = int(self._addresses.ctypes.data)

    def set(self, *values: float) -> None:
        """All values, in the parameters' order. struct.error where one is of another type or too large for it."""
        self._layout.pack_into(self._values, 0, *values)

    def values(self) -> tuple[Any, ...]:
        return self._layout.unpack(self._values)


class Module(Owned):
    """The kernels in one cubin. EngineError where it is damaged or for another GPU."""

    def __init__(self, cubin: bytes) -> None:
        super().__init__(call("cuModuleLoadData", cubin, asked="memory for a kernel"), "cuModuleUnload")

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """The kernel `name`, which uses `shared_bytes` of dynamic shared memory a block."""
        handle = call("cuModuleGetFunction", self.handle, name.encode())
        if shared_bytes > _SHARED_WITHOUT_ASKING:
            which = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", handle, which, shared_bytes)
        return Function(self, handle, shared_bytes)


class Function:
    """A kernel that can be launched."""

    def __init__(self, module: Module, handle: Any, shared_bytes: int) -> None:
        self._module = module  # it is unloaded with its last function
        self._handle = handle
        self._shared = shared_bytes
        self._early = lru_cache(maxsize=256)(self._early_launch)

    def launch(
        self, grid: Sequence[int], threads: int, arguments: Arguments, stream: SupportsInt, *, early: bool = False
    ) -> None:
        """Start grid (1 to 3 dimensions) blocks of `threads` threads, in the stream's order.

        early: its blocks may start before the kernel in front is over; a kernel that is launched so has to wait for that itself.
        """
        x, y, z = (*grid, 1, 1)[:3]
        if early:
            call("cuLaunchKernelEx", self._early(x, y, z, threads, int(stream)), self._handle, arguments.pointer, 0)
            return
        block = (threads, 1, 1, self._shared)
        call("cuLaunchKernel", self._handle, x, y, z, *block, int(stream), arguments.pointer, 0)

    def _early_launch(self, x: int, y: int, z: int, threads: int, stream: int) -> Any:
        """What cuLaunchKernelEx takes."""
        cuda = driver()
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = self._shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config
