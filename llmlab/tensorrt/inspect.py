"""What is inside an engine: its layers with their types, the plugin's among them, what is in place, and what each costs.

Where no plan can be opened, `layers.parse_listing(plan.listing)` gives the same `Listing` from what the build said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llmlab.errors import EngineError
from llmlab.tensorrt.layers import Binding, Layer, Listing, Value, nodes_of
from llmlab.tensorrt.library import Library

_TYPES = {
    "FP32": "Float",
    "FP16": "Half",
    "BF16": "BFloat16",
    "INT8": "Int8",
    "INT32": "Int32",
    "INT64": "Int64",
    "FP8": "FP8",
    "INT4": "Int4",
    "BOOL": "Bool",
}
_BINDING_TYPES = {
    "FLOAT": "Float",
    "HALF": "Half",
    "BF16": "BFloat16",
    "INT8": "Int8",
    "INT32": "Int32",
    "INT64": "Int64",
    "BOOL": "Bool",
}


def inspect_plan(library: Library, plan: Any, where: str = "the plan") -> dict[str, Any]:
    """The engine inspector's own JSON of a plan (bytes): `Layers`, `Bindings`. Raises EngineError where it can't be opened."""
    return inspector_json(library, library.load(plan, where))


def inspector_json(library: Library, engine: Any) -> dict[str, Any]:
    """The inspector's JSON of an engine that is open."""
    text = engine.create_engine_inspector().get_engine_information(library.module.LayerInformationFormat.JSON)
    try:
        answer = json.loads(text)
    except ValueError as problem:
        raise EngineError(f"the inspector of {library} gave no JSON ({problem})") from problem
    if not isinstance(answer, dict):
        raise EngineError(f"the inspector of {library} gave {type(answer).__name__}, expected a mapping")
    return answer


def listing_of(library: Library, engine: Any) -> Listing:
    """The layers of an engine that is open, and its inputs and outputs."""
    return Listing(layers_of(inspector_json(library, engine)), tuple(_bindings(library, engine)))


def layers_of(answer: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers in the inspector's JSON."""
    return tuple(_layer(entry) for entry in answer.get("Layers", ()))


@dataclass(frozen=True)
class Summary:
    """A few facts about an engine, in JSON types."""

    layers: int
    kinds: dict[str, int]
    """How many layers of each kind."""
    types: dict[str, int]
    """How many layers compute in each type: that of their weight, or else of their first output."""
    plugins: tuple[str, ...]
    """The layers that are llmlab's plugin, one a layer of the model and profile."""
    in_place: dict[str, str]
    """Outputs that are written into the memory of an input."""
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]
    """Of each optimization profile the smallest, usual and largest shape of every input."""


def summary(listing: Listing) -> Summary:
    """What a notebook shows first. In place is what the plugin itself reads from an input and writes to an output."""
    plugins = [layer for layer in listing.layers if layer.kind.startswith("Plugin")]
    inputs = {b.name for b in listing.bindings if b.is_input}
    outputs = {b.name for b in listing.bindings if not b.is_input}
    in_place: dict[str, str] = {}
    for layer in plugins:
        read = {_plain(v.name) for v in layer.inputs} & inputs
        written = {_plain(v.name) for v in layer.outputs} & outputs
        in_place |= {name: name.removesuffix(".updated") for name in written if name.removesuffix(".updated") in read}
    count = max((len(b.profiles) for b in listing.bindings), default=0)
    return Summary(
        layers=len(listing.layers),
        kinds=dict(Counter(layer.kind for layer in listing.layers)),
        types=dict(Counter(computes_in(layer) for layer in listing.layers if layer.outputs)),
        plugins=tuple(layer.name for layer in plugins),
        in_place=in_place,
        profiles=tuple({b.name: b.profiles[i] for b in listing.bindings if i < len(b.profiles)} for i in range(count)),
    )


def summary_of(library: Library, engine: Any) -> Summary:
    """The summary of an engine that is open, which knows itself what it writes in place."""
    return replace(summary(listing_of(library, engine)), in_place=library.aliased(engine))


def _plain(name: str) -> str:
    return name.partition(" [profile")[0]


def computes_in(layer: Layer) -> str:
    """The type of a product's weight; of any other layer, that of what it makes."""
    return layer.weight.dtype if layer.weight else layer.outputs[0].dtype


class LayerTimes:
    """How long each layer of an execution context took, summed over the steps that it was watched for.

    times = LayerTimes(library)
    with times.watch(context):
        context.execute_async_v3(stream)       # eagerly: a CUDA graph's layers aren't timed one by one
    times.rows()
    """

    def __init__(self, library: Library) -> None:
        self.milliseconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self._profiler = _make_profiler(library.module, self)

    @contextmanager
    def watch(self, context: Any) -> Iterator[None]:
        """What `context` runs in here is timed layer by layer, and waits for the GPU."""
        context.profiler = self._profiler
        try:
            yield
        finally:
            context.profiler = None

    def add(self, layer: str, milliseconds: float) -> None:
        self.milliseconds[layer] = self.milliseconds.get(layer, 0.0) + milliseconds
        self.calls[layer] += 1

    def rows(self) -> list[tuple[str, float, int]]:
        """(layer, milliseconds of a call, calls), the costliest layer first."""
        order = sorted(self.milliseconds.items(), key=lambda item: -item[1])
        return [(name, total / self.calls[name], self.calls[name]) for name, total in order]


def _make_profiler(trt: Any, times: LayerTimes) -> Any:
    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.add(layer_name, ms)

    return Profiler()


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):  # a plan without details has names alone
        return Layer(entry, "", (), (), ())
    ins, held, outs = (tuple(map(_value, entry.get(key) or ())) for key in ("Inputs", "Constants", "Outputs"))
    return Layer(entry["Name"], entry.get("LayerType", ""), ins, held, outs, nodes_of(entry.get("Metadata") or ""))


def _value(entry: dict[str, Any]) -> Value:
    said = entry.get("Datatype") or entry.get("Format/Datatype", "")
    words = said.replace("-", " ").split()
    dtype = next((_TYPES[word] for word in words if word in _TYPES), said)
    return Value(entry["Name"], tuple(entry.get("Dimensions", ())), dtype)


def _bindings(library: Library, engine: Any) -> Iterator[Binding]:
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == library.module.TensorIOMode.INPUT
        profiles: list[tuple[tuple[int, ...], ...]] = []
        for profile in range(engine.num_optimization_profiles if is_input else 0):
            profiles.append(tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)))
        member = engine.get_tensor_dtype(name).name
        shape = tuple(engine.get_tensor_shape(name))
        yield Binding(name, is_input, _BINDING_TYPES.get(member, member), shape, tuple(profiles))  # type: ignore[arg-type]
