"""Order on the GPU: streams, events, and captured graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import SupportsInt

from llmlab.cuda.driver import Owned, call, driver
from llmlab.errors import LlmlabError


class Stream(Owned):
    """A queue of GPU work that doesn't wait for the default stream."""

    def __init__(self) -> None:
        super().__init__(call("cuStreamCreate", 1), "cuStreamDestroy")  # 1: non-blocking

    def synchronize(self) -> None:
        """Wait until all its work is done; a kernel that failed is reported here."""
        call("cuStreamSynchronize", self.handle)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """What the block puts into the stream is recorded, not run; the graph can be launched once the block has ended.

        Nothing in the block may allocate or wait. Other threads may use the driver meanwhile.
        """
        graph = Graph()
        call("cuStreamBeginCapture", self.handle, driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield graph
        except BaseException:
            status, *ended = driver().cuStreamEndCapture(self.handle)
            if not status and int(ended[0]):
                driver().cuGraphDestroy(ended[0])
            raise
        graph._instantiate(call("cuStreamEndCapture", self.handle))


class Graph(Owned):
    """Work that was captured once and is launched as a whole, however often."""

    def __init__(self) -> None:
        super().__init__(0, "cuGraphExecDestroy")

    def _instantiate(self, recorded: SupportsInt) -> None:
        try:
            self.handle = int(call("cuGraphInstantiate", recorded, 0, asked="memory for a captured step"))
        finally:
            driver().cuGraphDestroy(recorded)

    def launch(self, stream: SupportsInt) -> None:
        if not self.handle:
            raise LlmlabError("this CUDA graph was not captured, or is freed")
        call("cuGraphLaunch", self.handle, int(stream))


class Event(Owned):
    """A point in a stream's work, to wait for or to measure from."""

    def __init__(self) -> None:
        super().__init__(call("cuEventCreate", 0), "cuEventDestroy")

    def record(self, stream: SupportsInt) -> None:
        call("cuEventRecord", self.handle, int(stream))

    def synchronize(self) -> None:
        """Wait until the work before the last `record` is done."""
        call("cuEventSynchronize", self.handle)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds from `since` to here, both of them recorded and reached."""
        return float(call("cuEventElapsedTime", since.handle, self.handle))
