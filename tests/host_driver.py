"""A stand-in for the CUDA driver whose memory is the host's: copies copy, streams run in order, captures record and replay.

Work that is put into a stream runs when the stream is waited for, so whoever forgets to wait sees stale memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from fake_driver import FakeDriver

Work = Callable[[], object]
POISON = 0xFF  # NaN in every float


class HostDriver(FakeDriver):
    """`enqueue` is what fake kernels and engines put their work into a stream with. `lose()` makes the GPU fail."""

    def __init__(self, free: int = 1 << 30, capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__(capability)
        self.total = self.free = free
        self.blocks: dict[int, Any] = {}
        self._queue: list[tuple[str, Work]] = []
        self._capturing: list[Work] | None = None
        self._captured: dict[int, list[Work]] = {}
        self._executable: dict[int, list[Work]] = {}
        self._lost: str | None = None
        self.replayed = 0

    def lose(self, status: str = "CUDA_ERROR_ILLEGAL_ADDRESS") -> None:
        self._lost = status

    def enqueue(self, work: Work) -> None:
        if self._capturing is not None:
            self._capturing.append(work)
        else:
            self._queue.append(("work", work))

    @property
    def in_use(self) -> int:
        return sum(ctypes.sizeof(block) for block in self.blocks.values())

    def _call(self, function: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._lost and function not in ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy"):
            return (IntEnum("CUresult", {self._lost: 999})(999),)  # type: ignore[misc]
        if function in self.refuse or function == "cuLaunchKernel":
            return super()._call(function, arguments)
        handler = getattr(self, f"_{function}", None)
        if handler is None:
            return 0, *self._results(function, arguments)
        return 0, *(handler(*arguments) or ())

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for _, work in queue:
            work()

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self.total - self.in_use, self.total

    def _cuMemAlloc(self, nbytes: int) -> tuple[int]:
        block = ctypes.create_string_buffer(nbytes + 256)
        ctypes.memset(block, POISON, nbytes + 256)
        address = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[address] = block
        return (address,)

    def _cuMemFree(self, address: int) -> None:
        self._drain()
        block = self.blocks.pop(address)
        ctypes.memset(block, POISON, ctypes.sizeof(block))

    def _cuMemcpyAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.enqueue(lambda: ctypes.memmove(target, source, nbytes))

    def _cuMemcpyHtoD(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def _cuMemcpyDtoH(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def _cuMemsetD8Async(self, target: int, value: int, nbytes: int, stream: int) -> None:
        self.enqueue(lambda: ctypes.memset(target, value, nbytes))

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert self._capturing is None, "a capture waits for nothing"
        self._drain()

    def _cuEventSynchronize(self, event: int) -> None:
        """Runs what was enqueued before the event's last record, and no more."""
        marks = [i for i, (what, _) in enumerate(self._queue) if what == f"event {event}"]
        ready, self._queue = (
            (self._queue[: marks[-1] + 1], self._queue[marks[-1] + 1 :]) if marks else ([], self._queue)
        )
        for _, work in ready:
            work()

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self._queue.append((f"event {event}", lambda: None))

    def _cuStreamBeginCapture(self, stream: int, mode: Any) -> None:
        assert self._capturing is None
        self._capturing = []

    def _cuStreamEndCapture(self, stream: int) -> tuple[int]:
        self._next += 1
        self._captured[self._next] = self._capturing or []
        self._capturing = None
        return (self._next,)

    def _cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int]:
        self._next += 1
        self._executable[self._next] = self._captured[graph]
        return (self._next,)

    def _cuGraphDestroy(self, graph: int) -> None:
        del self._captured[graph]

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self._executable[graph]

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        self.replayed += 1
        for work in self._executable[graph]:
            self.enqueue(work)


def view(address: int, shape: tuple[int, ...], dtype: Any, stride: int | None = None) -> np.ndarray:
    """The memory at `address` as an array; `stride`: elements between rows of a matrix."""
    kind = np.dtype(dtype)
    if stride is None or not shape[0]:
        count = int(np.prod(shape))
        raw = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
        return np.frombuffer(raw, kind, count).reshape(shape)
    rows, width = shape
    raw = (ctypes.c_char * (((rows - 1) * stride + width) * kind.itemsize)).from_address(address)
    flat = np.frombuffer(raw, kind)
    return np.lib.stride_tricks.as_strided(flat, shape, (stride * kind.itemsize, kind.itemsize))
