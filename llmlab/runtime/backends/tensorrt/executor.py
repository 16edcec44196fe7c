"""A program's steps in order, on one stream: eagerly, or as one CUDA graph for each shape of decode step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmlab.cuda import DeviceBuffer, Graph, Stream
from llmlab.runtime.backends.tensorrt.attention import AttentionLayers
from llmlab.runtime.backends.tensorrt.bindings import Bindings
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.backends.tensorrt.parts import Part
from llmlab.runtime.backends.tensorrt.rows import RowLayers
from llmlab.runtime.program import Attend, Program


class Executor:
    """Runs steps whose inputs lie in place already. Nothing here waits."""

    def __init__(
        self,
        program: Program,
        parts: Mapping[int, Part],
        attention: AttentionLayers,
        rows: RowLayers,
        bindings: Bindings,
        stream: Stream,
        buffers: Sequence[DeviceBuffer],
    ) -> None:
        """buffers: freed with it."""
        self.program = program
        self._parts = parts
        self._attention = attention
        self._rows = rows
        self._bindings = bindings
        self._stream = stream
        self._buffers = buffers
        self.plugin = not attention.kinds
        """Whether attention runs inside the parts."""
        self.splits = attention.splits
        self.logits = bindings.address("logits")
        """Address of the step's logits, float32 [N, vocab]."""
        self.graphs: dict[StepShape, Graph] = {}

    def run(self, shape: StepShape) -> None:
        """One step. The first decode step of a shape runs part by part, so that TensorRT settles what it does once for a shape,
        and is then captured without running; later ones are one launch."""
        if shape in self.graphs:
            self.graphs[shape].launch(self._stream)
            return
        self.enqueue(shape)
        if shape.decode:
            with self._stream.capture() as graph:
                self.enqueue(shape)
            self.graphs[shape] = graph

    def enqueue(self, shape: StepShape, after: Callable[[int], object] | None = None) -> None:
        """One after another. `after` is told the number of each step of the program once it is in the stream."""
        self._attention.locate(shape, self._stream)
        for at, step in enumerate(self.program.steps):
            if at in self._parts:
                self._parts[at].enqueue(shape, self._bindings, self._stream)
            elif isinstance(step, Attend):
                self._attention.enqueue(at, shape, self._stream)
            else:
                self._rows.enqueue(at, shape, self._stream)
            if after is not None:
                after(at)

    def free(self) -> None:
        for graph in self.graphs.values():
            graph.free()
        self.graphs.clear()
        self._parts = {}
        self._attention.free()
        self._rows.free()
        for buffer in self._buffers:
            buffer.free()
