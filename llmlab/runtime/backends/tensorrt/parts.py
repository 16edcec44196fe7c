"""Compiled parts: a context for each optimization profile, one block of scratch memory for all. Those that run the same plan
share its engine and contexts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from llmlab.cuda import DeviceBuffer, Stream
from llmlab.errors import EngineError
from llmlab.runtime.backends.tensorrt.bindings import POOL, Bindings
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.backends.tensorrt.memory import MOST_BLOCKS
from llmlab.runtime.program import RunPlan
from llmlab.tensorrt.library import Library

_DTYPES = {
    "HALF": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "FP8": "float8_e4m3fn",
}

Range = tuple[Sequence[int], Sequence[int]]


class Part:
    """One compiled part. A context is told addresses and shapes anew only when they change."""

    def __init__(
        self,
        library: Library,
        engine: Any,
        step: RunPlan,
        weights: Collection[str],
        reporting: Callable[[], AbstractContextManager[None]],
        contexts: dict[int, _Context],
    ) -> None:
        """weights: names of tensors whose shape is always the same. reporting: what raises at its end an error that happened
        inside a plugin. contexts: of the engine, by profile, which all parts that share the engine fill and use: TensorRT 8.6
        has one context a profile.

        Raises EngineError where the engine's inputs and outputs are not those of the program.
        """
        self.step = step
        self._reporting = reporting
        self._library = library
        self._engine = engine
        self._names = {**step.inputs, **step.outputs}
        self._sized = {name: tensor for name, tensor in step.inputs.items() if tensor not in weights}
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != set(self._names):
            odd = ", ".join(sorted(found ^ set(self._names)))
            raise EngineError(
                f"{step.plan}: its inputs and outputs are not the program's ({odd}): build the engine again"
            )
        self._profiles = [
            {name: self._range(name, p) for name in self._sized} for p in range(engine.num_optimization_profiles)
        ]
        self._contexts = contexts

    @property
    def scratch_bytes(self) -> int:
        """Device memory that the largest of its profiles needs while it runs."""
        return max(self._library.memory(self._engine, p) for p in range(len(self._profiles)))

    @property
    def most_blocks(self) -> int:
        """KV blocks that it was built for, at most; attention between the parts takes any number."""
        pools = [r[n][1][1] for r in self._profiles for n, tensor in self._sized.items() if tensor.startswith(POOL)]
        return min(pools, default=MOST_BLOCKS)

    def bind(self, bindings: Bindings, scratch: DeviceBuffer, stream: Stream) -> None:
        """Make a context for every profile. Raises EngineError where types differ from the program's."""
        for name, tensor in self._names.items():
            dtype = _DTYPES.get(self._engine.get_tensor_dtype(name).name)
            if dtype != bindings.dtype(tensor):
                raise EngineError(
                    f"{self.step.plan}: {name} is {dtype}, the program says {bindings.dtype(tensor)}: build the engine again"
                )
        self._addresses = {name: bindings.address(tensor) for name, tensor in self._names.items()}
        for number in range(len(self._profiles)):
            if number in self._contexts:
                continue
            context = self._library.context(self._engine)
            if not context.set_optimization_profile_async(number, int(stream)):
                raise EngineError(f"{self.step.plan}: profile {number} can't be chosen: {self._library.heard.text}")
            self._library.set_memory(context, scratch.pointer, scratch.nbytes)
            self._contexts[number] = _Context(context, bindings)

    def enqueue(self, shape: StepShape, bindings: Bindings, stream: Stream) -> None:
        """Run on inputs of a step's shape, in the stream's order. Raises EngineError where TensorRT refuses."""
        context = self._contexts[self._profile(shape, bindings)]
        self._library.heard.clear()
        with self._reporting():
            done = context.take(self._addresses, self._sized, shape) and context.run(int(stream))
        if not done:
            raise EngineError(
                f"{self.step.name or self.step.plan} failed in a step of {shape.tokens} tokens: "
                f"{self._library.heard.text or 'TensorRT gave no reason'}"
            )

    def _profile(self, shape: StepShape, bindings: Bindings) -> int:
        """The first profile that has room for the shape: those of a single size come first."""
        wanted = {name: bindings.shape(tensor, shape) for name, tensor in self._sized.items()}
        for number, ranges in enumerate(self._profiles):
            if all(_within(size, ranges[name]) for name, size in wanted.items()):
                return number
        raise EngineError(f"{self.step.plan}: no profile for {wanted}, only {self._profiles}")

    def _range(self, name: str, profile: int) -> Range:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)


class _Context:
    """An execution context, and the addresses and the shape that it was told last."""

    def __init__(self, context: Any, bindings: Bindings) -> None:
        self._context = context
        self._bindings = bindings
        self._addresses: Mapping[str, int] | None = None
        self._shape: StepShape | None = None

    def take(self, addresses: Mapping[str, int], sized: Mapping[str, str], shape: StepShape) -> bool:
        """Tell it what to read and write, as far as that changed. sized: inputs of this step's size, and their tensors."""
        if addresses is not self._addresses:
            self._addresses = None
            if not all(self._context.set_tensor_address(name, address) for name, address in addresses.items()):
                return False
            self._addresses = addresses
        if shape == self._shape:
            return True
        self._shape = None
        for name, tensor in sized.items():
            if not self._context.set_input_shape(name, self._bindings.shape(tensor, shape)):
                return False
        self._shape = shape
        return True

    def run(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))


def _within(size: Sequence[int], bounds: Range) -> bool:
    low, high = bounds
    return len(size) == len(low) and all(a <= n <= b for a, n, b in zip(low, size, high, strict=True))
