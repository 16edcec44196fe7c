"""Products with quantized weights for ONNX Runtime's CPU: MatMulNBits, which unpacks four- and eight-bit weights while it multiplies.

Its weights are uint8 [N, K / block, block · bits / 8], low nibble first, with a scale [N, K / block] for each block. The accuracy
level says what it computes in: 1 in float32; 4 rounds each row's activations to int8, block by block, which is several times faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, producer, scope, sort_nodes
from llmlab.graph.linear import linear
from llmlab.graph.quantized import QuantizedWeight, joined
from llmlab.graph.store.deferred import DeferredValues
from llmlab.graph.store.storage import array

ACCURACY_LEVELS = (1, 4)
_BITS = {"int4": 4, "int8": 8}
_BLOCKS = (16, 32, 64, 128, 256)
_SPREAD = (128, 64, 32, 16)
"""Blocks that a scale of a whole row is written to, the first that comes out even."""


def check_accuracy_level(given: int) -> None:
    """Raises InputError for a level that there isn't."""
    if given not in ACCURACY_LEVELS or isinstance(given, bool):
        raise InputError(
            f"accuracy_level is {given!r}, expected 1 (float32) or 4 (activations rounded to int8 by blocks)"
        )


def lower_weight_only(edit: Editor, accuracy_level: int) -> None:
    """x @ DequantizeLinear(W) (+ bias) → MatMulNBits, in place; what it can't express stays as it is.

    At level 1 eight-bit weights stay as well: there the operator is slower than DequantizeLinear in front of a product.
    """
    check_accuracy_level(accuracy_level)
    for node in list(edit.surgeon.nodes):
        layer = linear(node)
        weight = joined(layer.weight) if layer is not None else None
        if layer is None or weight is None or producer(node.inputs[0], "DequantizeLinear") is not None:
            continue
        blocks = in_blocks(weight if layer.transposed else weight.transposed())
        if blocks is None or (accuracy_level == 1 and blocks.bits == 8):
            continue
        bias = layer.bias if not edit.is_output(node.outputs[0]) else None
        out = layer.out if bias is not None or layer.bias is None else node.outputs[0]
        attrs = {"K": layer.depth, "N": layer.width, "bits": blocks.bits, "block_size": blocks.block}
        inputs = [node.inputs[0], *blocks.constants(edit, weight.values.name), None, bias]
        made = edit.add(
            "MatMulNBits",
            scope(node),
            inputs,
            {**attrs, "accuracy_level": accuracy_level},
            dtype=out.dtype,
            shape=out.shape,
            domain="com.microsoft",
        )
        edit.replace(out, made)
        node.outputs.clear()
    sort_nodes(edit.surgeon.cleanup())


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] as blocks along K. `weight` has its channels on axis 0 and its groups on axis 1."""

    weight: QuantizedWeight
    bits: int
    block: int

    def constants(self, edit: Editor, name: str) -> list[gs.Constant | None]:
        """Values, scales and zero points as MatMulNBits takes them, computed when they are written."""
        rows, depth = self.weight.shape
        count = -(-depth // self.block)
        shapes = {"values": (rows, count, self.block * self.bits // 8), "scale": (rows, count)}
        if self.weight.zero_point is not None:
            shapes["zero_point"] = (rows, -(-count * self.bits // 8))
        made = {
            what: gs.Constant(edit.name(f"{name}.{what}"), Blocked(self, what, shape)) for what, shape in shapes.items()
        }
        return [made["values"], made["scale"], made.get("zero_point")]

    def values(self) -> np.ndarray:
        rows, depth = self.weight.shape
        given = array(self.weight.values).astype(np.int16) + (1 << self.bits - 1)
        padded = np.full((rows, -(-depth // self.block) * self.block), 1 << self.bits - 1, np.uint8)
        padded[:, :depth] = given
        return _nibbles(padded) if self.bits == 4 else padded

    def scale(self) -> np.ndarray:
        return self._by_block(array(self.weight.scale).astype(np.float32))

    def zero_point(self) -> np.ndarray:
        assert self.weight.zero_point is not None
        given = array(self.weight.zero_point).astype(np.int16) + (1 << self.bits - 1)
        whole = np.ascontiguousarray(self._by_block(given.astype(np.uint8)))
        if self.bits == 8:
            return whole
        return _nibbles(np.pad(whole, ((0, 0), (0, whole.shape[1] % 2))))

    def _by_block(self, scale: np.ndarray) -> np.ndarray:
        """[N, blocks] of a number for each group, channel or tensor."""
        rows, depth = self.weight.shape
        count = -(-depth // self.block)
        if self.weight.block:
            return np.repeat(scale, self.weight.block // self.block, 1)[:, :count]
        return np.broadcast_to(scale.reshape(-1, 1), (rows, count))


def in_blocks(weight: QuantizedWeight) -> Blocks | None:
    """How MatMulNBits can hold a weight [N, K]; None where it can't."""
    bits = _BITS.get(weight.dtype)
    if bits is None or len(weight.shape) != 2:
        return None
    if weight.block:
        return Blocks(weight, bits, weight.block) if weight.axis == 1 and weight.block in _BLOCKS else None
    if not weight.per_tensor and weight.axis != 0:
        return None
    depth = weight.shape[1]
    return Blocks(weight, bits, next((b for b in _SPREAD if depth % b == 0), _SPREAD[2]))


def _nibbles(numbers: np.ndarray) -> np.ndarray:
    """uint8 [..., 2n] below 16 → [..., n], low nibble first."""
    return numbers[..., 0::2] | numbers[..., 1::2] << 4


class Blocked(DeferredValues):
    """One of a weight's arrays as MatMulNBits takes it, computed when it is written."""

    def __init__(self, blocks: Blocks, what: str, shape: tuple[int, ...]) -> None:
        super().__init__(shape, np.dtype(np.float32 if what == "scale" else np.uint8))
        self.blocks = blocks
        self._make = getattr(blocks, what)
        part = getattr(blocks.weight, "values" if what == "values" else what)
        self.sources = [part._values]

    def load(self) -> np.ndarray:
        return np.ascontiguousarray(self._make()).reshape(self.shape)
