"""The layers of an engine as the builder lists them: what TensorRT's inspector would say, on machines where no plan can be opened.

A plan can be opened only where a GPU is that it was built for. The builder's verbose log holds the same lines, though: a line
a layer, then the engine's inputs and outputs with their profiles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmlab.errors import EngineError

Shape = tuple[int, ...]

_NODE = re.compile(r"\[ONNX Layer: ([^\]|]+)")
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (?P<rest>(?:Constants|Outputs): \[.*)"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d,]*)\],.*?Datatype: (?P<dtype>[\w ]+),"
)
_BINDING = re.compile(
    r"\s*Name: (?P<name>.*?), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), Dimensions: \[(?P<shape>[-\d,]*)\]"
)
_RANGE = re.compile(r"MinShape: \[([\d,]*)\], OptShape: \[([\d,]*)\], MaxShape: \[([\d,]*)\]")


@dataclass(frozen=True)
class Value:
    """A tensor that a layer reads or writes. `dtype` as TensorRT says it: Half, BFloat16, Int8, FP8, Int4, …; -1 is any size."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Layer:
    """One kernel (or one plugin) of an engine. `kind`: gemm, kgen, runtime_fusion, PluginV3, Constant, …"""

    name: str
    kind: str
    inputs: tuple[Value, ...]
    constants: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[str, ...] = ()
    """Names of the ONNX nodes that it computes, where TensorRT says so."""

    @property
    def weight(self) -> Value | None:
        """The matrix of a product; None for a layer that is none."""
        if self.kind not in ("gemm", "runtime_fusion") and "Fc" not in self.name:
            return None
        return next((c for c in self.constants if len(c.shape) == 2 and min(c.shape) > 1), None)


@dataclass(frozen=True)
class Binding:
    """An input or output of the engine, and of an input the smallest, usual and largest shape in each profile."""

    name: str
    is_input: bool
    dtype: str
    shape: Shape
    profiles: tuple[tuple[Shape, Shape, Shape], ...]


@dataclass(frozen=True)
class Listing:
    """What an engine consists of, all its profiles' layers one after another."""

    layers: tuple[Layer, ...]
    bindings: tuple[Binding, ...]


def parse_listing(text: str) -> Listing:
    """The builder's message that starts with `Layers:`. Raises EngineError for text that is none."""
    layers, bindings = [], []
    for line in text.splitlines():
        if found := _LAYER.match(line):
            constants, _, outputs = found["rest"].rpartition("Outputs: [")
            ins, held, outs = map(_values, (found["inputs"], constants, outputs))
            nodes = nodes_of(line.rpartition("Metadata: ")[2])
            layers.append(Layer(found["name"], found["kind"], ins, held, outs, nodes))
        elif found := _BINDING.match(line):
            profiles = tuple((_shape(a), _shape(b), _shape(c)) for a, b, c in _RANGE.findall(line))
            bindings.append(
                Binding(found["name"], found["mode"] == "Input", found["dtype"], _shape(found["shape"]), profiles)
            )
    if not layers or not bindings:
        raise EngineError("TensorRT listed no layers: build with a logger that keeps verbose messages")
    return Listing(tuple(layers), tuple(bindings))


def nodes_of(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's metadata names."""
    return tuple(_NODE.findall(metadata))


def _values(text: str) -> tuple[Value, ...]:
    return tuple(Value(m["name"], _shape(m["shape"]), m["dtype"]) for m in _TENSOR.finditer(text))


def _shape(text: str) -> Shape:
    return tuple(int(n) for n in text.split(",") if n)
