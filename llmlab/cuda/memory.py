"""Device memory, page-locked host memory, and copies between them."""

from __future__ import annotations

from typing import Any, SupportsInt

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmlab.cuda.driver import Owned, call, gigabytes


class DeviceBuffer(Owned):
    """`nbytes` of GPU memory, uninitialised, aligned to 256 bytes. `purpose` says in an error what it was for.

    `free` waits for the work that is under way.
    """

    def __init__(self, nbytes: int, purpose: str = "") -> None:
        asked = gigabytes(nbytes) + (f" for {purpose}" if purpose else "")
        super().__init__(call("cuMemAlloc", max(1, nbytes), asked=asked), "cuMemFree")
        self.nbytes = nbytes

    @property
    def pointer(self) -> int:
        return self.handle

    @classmethod
    def of(cls, array: NDArray[Any], purpose: str = "") -> DeviceBuffer:
        """A copy of `array`, row by row."""
        array = np.ascontiguousarray(array)
        buffer = cls(array.nbytes, purpose)
        try:
            buffer.upload(array)
        except BaseException:
            buffer.free()
            raise
        return buffer

    def upload(self, array: NDArray[Any], offset: int = 0) -> None:
        """Copy a contiguous `array` to `offset` bytes from the start, and wait for it."""
        if not array.flags.c_contiguous or offset < 0 or offset + array.nbytes > self.nbytes:
            raise ValueError(f"{array.nbytes} bytes at {offset} don't fit into {self.nbytes}, or are not contiguous")
        if array.nbytes:
            call("cuMemcpyHtoD", self.pointer + offset, array.ctypes.data, array.nbytes)

    def to_numpy(self, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of the first elements. Waits for work on streams that were created blocking, not for others: synchronize first."""
        array = np.empty(shape, dtype)
        if array.nbytes > self.nbytes:
            raise ValueError(f"{array.nbytes} bytes of {dtype} {shape} are not in a buffer of {self.nbytes}")
        if array.nbytes:
            call("cuMemcpyDtoH", array.ctypes.data, self.pointer, array.nbytes)
        return array

    def fill_byte(self, value: int, stream: SupportsInt) -> None:
        """Set every byte to `value`, in the stream's order."""
        fill_async(self.pointer, value, self.nbytes, stream)


class _PageLocked(Owned):
    """Page-locked memory that NumPy views, freed when no view is left."""

    def __init__(self, nbytes: int) -> None:
        asked = f"{gigabytes(nbytes)} of page-locked host memory"
        super().__init__(call("cuMemHostAlloc", max(1, nbytes), 1, asked=asked), "cuMemFreeHost")  # 1: for all contexts
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (self.handle, False)}


class PinnedArray:
    """Page-locked host memory: copies from and to it run beside the host's work. `array` [shape] is zero at first."""

    def __init__(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        memory = np.asarray(_PageLocked(int(np.prod(shape, dtype=np.int64)) * kind.itemsize))
        self.array: NDArray[Any] = memory.view(kind).reshape(shape)
        self.array.fill(0)
        self.pointer = int(memory.ctypes.data)
        self.nbytes = int(memory.nbytes)


def copy_async(target: int, source: int, nbytes: int, stream: SupportsInt) -> None:
    """Copy between any two addresses, host (page-locked) or device, in the stream's order."""
    if nbytes:
        call("cuMemcpyAsync", target, source, nbytes, int(stream))


def fill_async(target: int, value: int, nbytes: int, stream: SupportsInt) -> None:
    """Set `nbytes` bytes of device memory to `value`, in the stream's order."""
    if nbytes:
        call("cuMemsetD8Async", target, value, nbytes, int(stream))
