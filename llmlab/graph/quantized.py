"""Quantized weights in a graph: DequantizeLinear on constants, alone or joined where products are merged.

A stored weight [N, K] is `DequantizeLinear(values, scale, zero_point?)`: per channel with `axis` 0 and scale [N], by groups with
`axis` 1, `block_size` and scale [N, K / block_size], per tensor with one scale. A weight stored [K, N] has the axes swapped, and
stacked experts [E, N, K] are grouped along the last one. Values are int8, int4 or float8_e4m3fn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand, producer
from llmlab.graph.store.lazy import Joined, LazyArray, Values, row, swapped
from llmlab.graph.store.storage import array


@dataclass(frozen=True)
class QuantizedWeight:
    """(values − zero_point) · scale. axis: of `values`, the channels' or the one that is grouped; block: numbers along it that share
    a scale, 0 where a channel does, or the whole tensor (scale [])."""

    values: gs.Constant
    scale: gs.Constant
    zero_point: gs.Constant | None
    axis: int
    block: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.values.shape)

    @property
    def dtype(self) -> str:
        """int8, int4 or float8_e4m3fn."""
        return np.dtype(self.values.dtype).name

    @property
    def per_tensor(self) -> bool:
        return not self.block and int(np.prod(self.scale.shape, dtype=np.int64)) == 1

    def dequantize(self) -> np.ndarray:
        """What the numbers stand for, float32, as DequantizeLinear defines it."""
        values = array(self.values).astype(np.float32)
        if self.zero_point is not None:
            values -= self._spread(array(self.zero_point).astype(np.float32))
        return values * self._spread(array(self.scale).astype(np.float32))

    def _spread(self, scale: np.ndarray) -> np.ndarray:
        if self.per_tensor:
            return scale.reshape(())
        if self.block:
            whole = np.repeat(scale, self.block, self.axis)
            return whole[tuple(slice(0, d) for d in self.shape)]
        return np.expand_dims(scale, tuple(i for i in range(len(self.shape)) if i != self.axis))

    def transposed(self) -> QuantizedWeight:
        """The same weight, stored the other way round; computed when it is written."""
        parts = (self.values, self.scale, self.zero_point)
        made = [None if t is None or len(t.shape) != 2 else _constant(f"{t.name}.T", _turned(t._values)) for t in parts]
        values, scale, zero = (new or old for new, old in zip(made, parts, strict=True))
        assert values is not None and scale is not None
        return QuantizedWeight(values, scale, zero, 1 - self.axis, self.block)

    def row(self, index: int) -> QuantizedWeight:
        """One of several weights that are stacked along the first axis, of which the others are not read."""
        made = [
            None if t is None else t if not tuple(t.shape) else _constant(f"{t.name}.{index}", row(t._values, index))
            for t in (self.values, self.scale, self.zero_point)
        ]
        assert made[0] is not None and made[1] is not None
        return QuantizedWeight(made[0], made[1], made[2], max(self.axis - 1, 0), self.block)

    def add(self, edit: Editor, where: str) -> gs.Variable:
        """The DequantizeLinear of this weight, in module `where`; its result has the scale's type."""
        attrs = {"axis": self.axis} if tuple(self.scale.shape) else {}
        if self.block:
            attrs["block_size"] = self.block
        inputs = [self.values, self.scale, self.zero_point]
        return edit.add("DequantizeLinear", where, inputs, attrs, dtype=self.scale.dtype, shape=list(self.shape))


def quantized(tensor: gs.Tensor | None) -> QuantizedWeight | None:
    """The quantized weight that `tensor` is, seen through Identity, and through a Cast between types of floats."""
    node = None if tensor is None else producer(tensor)
    while node is not None and node.op in ("Identity", "Cast"):
        node = producer(node.inputs[0])
    if node is None or node.op != "DequantizeLinear":
        return None
    values, scale, zero = node.inputs[0], node.inputs[1], operand(node, 2)
    if not isinstance(values, gs.Constant) or not isinstance(scale, gs.Constant):
        return None
    if zero is not None and not isinstance(zero, gs.Constant):
        return None
    rank = len(values.shape)
    axis = int(node.attrs.get("axis", 1))
    return QuantizedWeight(values, scale, zero, axis % rank if rank else 0, int(node.attrs.get("block_size", 0)))


def joined(tensor: gs.Tensor | None) -> QuantizedWeight | None:
    """The quantized weight that `tensor` is, also where it is a Concat of weights that are quantized alike (one type, one group
    size, with zero points or without): then their arrays joined, computed when they are written."""
    node = None if tensor is None else producer(tensor, "Concat")
    if node is None:
        return quantized(tensor)
    parts = [quantized(t) for t in node.inputs]
    weights = [p for p in parts if p is not None]
    if (
        len(weights) != len(parts)
        or len({(w.dtype, w.block, w.scale.dtype, w.zero_point is None) for w in weights}) > 1
    ):
        return None
    along = int(node.attrs["axis"]) % len(weights[0].shape)
    if weights[0].block:
        if len({w.axis for w in weights}) > 1:
            return None
        if along == weights[0].axis and any(w.shape[along] % w.block for w in weights[:-1]):
            return None  # a short group in the middle
        scales, axis = [w.scale._values for w in weights], weights[0].axis
    elif all(w.per_tensor or w.axis == along for w in weights):
        scales, axis = [_per_channel(w.scale, w, along) for w in weights], along
    else:
        return None
    name = node.outputs[0].name
    values = _constant(f"{name}.values", Joined([w.values._values for w in weights], along))
    scale = _constant(f"{name}.scale", Joined(scales, along if weights[0].block else 0))
    zero = None
    if weights[0].zero_point is not None:
        zeros = [w.zero_point for w in weights if w.zero_point is not None]
        spread = [
            z._values if weights[0].block else _per_channel(z, w, along) for z, w in zip(zeros, weights, strict=True)
        ]
        zero = _constant(f"{name}.zero_point", Joined(spread, along if weights[0].block else 0))
    return QuantizedWeight(values, scale, zero, axis, weights[0].block)


class _Repeated(LazyArray):
    """One number, `count` times."""

    def __init__(self, source: Values, count: int) -> None:
        super().__init__((count,), np.dtype(source.dtype))
        self.source, self.sources = source, [source]

    def fill(self, out: np.ndarray) -> None:
        source = self.source
        out[...] = np.asarray(source if isinstance(source, np.ndarray) else source.load()).reshape(())


def _per_channel(scale: gs.Constant, weight: QuantizedWeight, along: int) -> Values:
    """A scale (or zero point) for each channel of `weight`, also where the whole tensor has one."""
    return _Repeated(scale._values, weight.shape[along]) if weight.per_tensor else scale._values


def _turned(values: Values) -> Values:
    return swapped(values, 0, 1)


def _constant(name: str, values: Values) -> gs.Constant:
    return gs.Constant(name, values)
