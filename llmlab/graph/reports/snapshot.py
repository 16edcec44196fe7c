"""What a graph is at one moment, as text: small enough to keep while a pass rewrites the graph, and to compare."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

_FEW = 16  # numbers; a constant of integers up to this size is a shape, axes or slice, and shown by value
_LONG = 100  # characters of an attribute


class NodeFacts(NamedTuple):
    """One node. Inputs are named by what makes them, so that a tensor's own name makes no difference."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Type and shape of each: `float32[T, 64]`."""
    attributes: tuple[tuple[str, str], ...]


class Snapshot(NamedTuple):
    """The nodes by name; type and shape of each weight by its name, and of what goes in and comes out."""

    nodes: dict[str, NodeFacts]
    weights: dict[str, str]
    ports: dict[str, str]
    """By `input NAME` and `output NAME`."""


def snapshot(graph: gs.Graph) -> Snapshot:
    """The graph as it is now. Weights are named, not read."""
    names = node_names(graph)
    labels: dict[int, str] = {}
    weights: dict[str, str] = {}

    def label(tensor: gs.Tensor) -> str:
        if id(tensor) not in labels:
            labels[id(tensor)] = text = _label(tensor, names)
            if text == tensor.name and isinstance(tensor, gs.Constant):
                weights[text] = kind_of(tensor)
        return labels[id(tensor)]

    nodes = {
        names[id(node)]: NodeFacts(
            f"{node.domain}::{node.op}" if node.domain else node.op,
            tuple(map(label, node.inputs)),
            tuple(map(kind_of, node.outputs)),
            tuple((key, attribute_text(value)) for key, value in sorted(node.attrs.items())),
        )
        for node in graph.nodes
    }
    ports = {f"input {t.name}": kind_of(t) for t in graph.inputs}
    ports |= {f"output {t.name}": f"{kind_of(t)} of {label(t)}" for t in graph.outputs}
    return Snapshot(nodes, weights, ports)


def node_names(graph: gs.Graph) -> dict[int, str]:
    """A name for each node; a graph from elsewhere may have nodes of the same name, or of none."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        name = base = node.name or f"{node.op} of {node.outputs[0].name if node.outputs else 'nothing'}"
        count = 1
        while name in taken:
            count += 1
            name = f"{base} #{count}"
        taken.add(name)
        names[id(node)] = name
    return names


def _label(tensor: gs.Tensor, names: dict[int, str]) -> str:
    if isinstance(tensor, gs.Constant):
        values = tensor._values
        known = isinstance(values, np.ndarray)
        if known and (values.size == 1 or (values.size <= _FEW and values.dtype.kind in "iub")):
            return f"{values.dtype} {values.tolist()}"
        return str(tensor.name)
    if not tensor.inputs:
        return str(tensor.name)
    maker = tensor.inputs[0]
    name = names.get(id(maker), maker.name)
    if len(maker.outputs) == 1:
        return name
    return f"{name}:{next(i for i, out in enumerate(maker.outputs) if out is tensor)}"


def kind_of(tensor: gs.Tensor) -> str:
    """`float32[T, 64]`; a type or a shape that isn't known is a question mark."""
    dtype, shape = tensor.dtype, tensor.shape
    kind = "?" if dtype is None else _element_type(dtype)
    return f"{kind}[{', '.join(map(str, shape))}]" if shape is not None else f"{kind}[?]"


def _element_type(dtype: Any) -> str:
    try:
        return _TYPES[dtype]
    except KeyError:
        _TYPES[dtype] = name = f"onnx type {dtype}" if isinstance(dtype, int) else str(np.dtype(dtype))
        return name


_TYPES: dict[Any, str] = {}


def attribute_text(value: Any) -> str:
    """An attribute as text; a long one by its beginning and a checksum, so that a difference is still seen."""
    if isinstance(value, gs.Graph):
        return f"graph of {len(value.nodes)} nodes ({zlib.crc32(repr(snapshot(value)).encode()):08x})"
    if isinstance(value, gs.Constant):
        return f"{kind_of(value)} {_array(value._values)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} {_array(value)}"
    text = _sequence(value) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}… ({zlib.crc32(text.encode()):08x})"


def _sequence(values: Sequence[Any]) -> str:
    return "[" + ", ".join(map(attribute_text, values)) + "]"


def _array(values: Any) -> str:
    if not isinstance(values, np.ndarray):
        return "not read"
    return (
        str(values.tolist()) if values.size <= _FEW else f"({zlib.crc32(np.ascontiguousarray(values).tobytes()):08x})"
    )
