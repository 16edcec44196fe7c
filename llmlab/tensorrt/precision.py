"""Weak typing: the ONNX file is in float32, and the builder chooses. This says where it may not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmlab.errors import InputError

_NOTED = re.compile(r"ONNX Layer: ([^\]|]+)")


@dataclass(frozen=True)
class WeakTyping:
    """What a file in float32 leaves open, for a TensorRT that chooses precisions itself."""

    io: Mapping[str, str] = field(default_factory=dict)
    """Inputs and outputs that are of another type than the file's, such as float16 between pieces."""
    float32: Collection[str] = ()
    """Names of ONNX nodes that must compute in float32: norms, softmax, logits."""


def apply_weak_typing(trt: Any, network: Any, typing: WeakTyping) -> int:
    """Declare it in a parsed network; gives how many layers were held in float32. InputError for a name that isn't there."""
    types = {"float16": trt.float16, "float32": trt.float32, "int32": trt.int32}
    tensors = {t.name: t for t in _tensors(network)}
    for name, dtype in typing.io.items():
        if name not in tensors or dtype not in types:
            raise InputError(
                f"weak typing of {name} as {dtype}: expected {', '.join(sorted(types))} of {', '.join(sorted(tensors))}"
            )
        tensors[name].dtype = types[dtype]
    wanted = set(typing.float32)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    nodes = {layer.name: node for layer in layers if (node := _node_of(layer, wanted)) is not None}
    if missing := wanted - set(nodes.values()):
        raise InputError(
            f"the parsed network has no layer of {min(missing)}, which must stay float32 ({len(missing)} such)"
        )
    held = [layer for layer in layers if layer.name in nodes and _computes(trt, layer)]
    between = {t.name for layer in held for t in map(layer.get_input, range(layer.num_inputs)) if t is not None}
    for layer in held:
        layer.precision = trt.float32
        for i in range(layer.num_outputs):
            output = layer.get_output(i)
            # What only others read may be narrow already, and what leaves the network has its type declared.
            if output.name in between and not output.is_network_output:
                layer.set_output_type(i, trt.float32)
    return len(held)


def _computes(trt: Any, layer: Any) -> bool:
    """Whether a layer works on numbers, rather than on shapes or indices, or only carries a weight."""
    if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
        return False
    return all(layer.get_output(i).dtype in (trt.float32, trt.float16) for i in range(layer.num_outputs))


def _node_of(layer: Any, wanted: Collection[str]) -> str | None:
    """The wanted ONNX node that a layer was made of. The parser notes it, and numbers a node's further layers: `name_3`."""
    head, _, tail = layer.name.rpartition("_")
    names = [*_NOTED.findall(layer.metadata or ""), layer.name, *([head] if tail.isdecimal() else [])]
    return next((name for name in names if name in wanted), None)


def _tensors(network: Any) -> list[Any]:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    return inputs + [network.get_output(i) for i in range(network.num_outputs)]
