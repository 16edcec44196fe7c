"""Quantized weights and activations in a graph, as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, producer, scope
from llmlab.graph.linear import linear, product
from llmlab.graph.narrow import narrow_scale
from llmlab.graph.quantized import QuantizedWeight
from llmlab.graph.store.deferred import DeferredValues, Packed
from llmlab.graph.store.lazy import Stacked
from llmlab.graph.store.packed import is_packed
from llmlab.graph.store.storage import onnx_dtype
from llmlab.quant.grid import FP8, Grid, Rounded
from llmlab.quant.projections import Projection
from llmlab.quant.rounding import Rounding
from llmlab.quant.scheme import Activations

_LEAST_SCALE = 1e-12
"""Of a token whose numbers are all zero."""


def place_weight(edit: Editor, projection: Projection, rounded: Rounded | Rounding) -> gs.Variable:
    """Let `projection` read a quantized weight: `DequantizeLinear(values, scale, zero_point?)`, whose output is given back.

    rounded: the weight [N, K] on a grid, or a Rounding that computes it when it is written. Whoever else reads the weight (a tied
    embedding) still reads the wide one. The scale is in the type that the weight had.
    """
    shape, turned = tuple(int(d) for d in projection.weight.shape), not projection.transposed
    layout = _Layout(shape, turned, rounded.grid, experts=len(shape) > 2)
    inner = _Layout(shape[1:], turned, rounded.grid, experts=True) if len(shape) > 2 else layout
    dtype = np.dtype(projection.weight.dtype)
    names = {"values": f"{projection.name}.weight.{rounded.grid.dtype}"}
    made: dict[str, gs.Constant] = {}
    for what in ("values", "scale", "zero_point"):
        if what == "zero_point" and rounded.grid.symmetric:
            continue
        kind = dtype if what == "scale" else rounded.grid.stored
        values: Any
        if isinstance(rounded, Rounding) and rounded.experts:
            values = Stacked([_Part(expert, inner, what, kind) for expert in rounded.experts])
        elif isinstance(rounded, Rounding):
            values = _Part(rounded, layout, what, kind)
        else:
            values = layout.stored(rounded, what, kind)
            values = Packed.of(values) if is_packed(values.dtype) else values
        made[what] = gs.Constant(edit.name(names.get(what, f"{projection.name}.weight.{what}")), values)
    weight = QuantizedWeight(made["values"], made["scale"], made.get("zero_point"), layout.axis, layout.block)
    wide = weight.add(edit, projection.name)
    projection.reader.inputs[projection.index] = wide
    return wide


class _Layout:
    """How a weight [N, K] on a grid lies in the graph, in the shape that the wide one had; turned: as [K, N]. experts: a scale a row is
    written as one for each group of K, since DequantizeLinear has scales along one axis only."""

    def __init__(self, shape: tuple[int, ...], turned: bool, grid: Grid, experts: bool) -> None:
        self.shape, self.turned = shape, turned
        depth = len(shape) - (2 if turned else 1)  # the axis of K
        self.block = grid.group or (shape[depth] if experts and grid.per == "channel" else 0)
        self.axis = depth if self.block else len(self.shape) - (1 if self.turned else 2)
        scales = list(self.shape)
        if self.block:
            scales[depth] //= self.block
            self.scale_shape: tuple[int, ...] = tuple(scales)
        else:
            self.scale_shape = () if grid.per == "tensor" else (self.shape[self.axis],)

    def stored(self, rounded: Rounded, what: str, dtype: np.dtype) -> np.ndarray:
        """`values`, `scale` or `zero_point` as they are stored."""
        given = getattr(rounded, what) if what != "scale" else narrow_scale(rounded.scale, dtype)
        return self.arranged(np.asarray(given), self.shape if what == "values" else self.scale_shape).astype(dtype)

    def arranged(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2 or not self.turned:
            return rows.reshape(shape)
        return np.swapaxes(rows.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)


class _Part(DeferredValues):
    """One array of a quantized weight, computed when it is written."""

    def __init__(self, rounding: Rounding, layout: _Layout, what: str, dtype: np.dtype) -> None:
        super().__init__(layout.shape if what == "values" else layout.scale_shape, dtype)
        self._rounding, self._layout, self._what = rounding, layout, what
        self.sources = [rounding.source]

    def load(self) -> np.ndarray:
        if self._what == "values":
            return self._layout.stored(self._rounding.rounded(), "values", self.dtype)
        scale, zero = self._rounding.scales()
        given = narrow_scale(scale, self.dtype) if self._what == "scale" else zero
        return self._layout.arranged(np.asarray(given), self.shape).astype(self.dtype)


def place_activation(
    edit: Editor, projection: Projection, activations: Activations, scale: float | np.ndarray | None = None
) -> None:
    """Round what the product of `projection` multiplies; once for all projections that are merged in it.

    scale: of a static one (per tensor), a positive number. A dynamic one computes a scale for each token in the step.
    """
    node = projection.node
    x = node.inputs[0]
    if producer(x, "DequantizeLinear") is not None:
        return  # another projection of this product was here
    where, dtype = scope(node), np.dtype(x.dtype)
    kind = FP8 if activations.dtype == "fp8" else np.dtype(np.int8)
    attrs: dict[str, int] = {}
    if activations.dynamic:
        step, attrs = _token_scales(edit, where, x, activations.grid.high), {"axis": 0}
    else:
        number = np.asarray(scale, np.float32)
        if number.size != 1 or not np.isfinite(number).all() or not (number > 0).all():
            raise InputError(f"{projection.name}: the scale of its activations is {scale}, expected a positive number")
        step = edit.constant(f"{projection.name}.input.scale", narrow_scale(number.reshape(()), dtype))
    to = {**attrs, "output_dtype": onnx_dtype(kind)}
    narrow = edit.add("QuantizeLinear", where, [x, step], to, dtype=kind, shape=x.shape)
    node.inputs[0] = edit.add("DequantizeLinear", where, [narrow, step], attrs, dtype=dtype, shape=x.shape)


def _token_scales(edit: Editor, where: str, x: gs.Tensor, high: int) -> gs.Tensor:
    """The scale of each row of x [T, K]: its largest number over the grid's, [T]."""
    dtype, shape = np.dtype(x.dtype), list(x.shape)

    def number(name: str, given: float) -> gs.Constant:
        return edit.constant(f"{where}/{name}", np.asarray(given, dtype))

    size = edit.add("Abs", where, [x], dtype=dtype, shape=shape)
    axis = edit.constant(f"{where}/axis", np.array([-1], np.int64))
    most = edit.add("ReduceMax", where, [size, axis], {"keepdims": 0}, dtype=dtype, shape=shape[:-1])
    step = edit.add("Div", where, [most, number("high", high)], dtype=dtype, shape=shape[:-1])
    least = max(_LEAST_SCALE, float(np.finfo(np.float32).tiny) if dtype != np.float16 else 6e-8)
    return edit.add("Max", where, [step, number("least", least)], dtype=dtype, shape=shape[:-1])


def take_apart(edit: Editor, node: gs.Node, names: Sequence[str]) -> None:
    """A merged product → one for each of its weights, in modules of these names, and their results side by side: for activations that
    are rounded differently."""
    layer = linear(node)
    join = producer(layer.weight, "Concat") if layer is not None else None
    if layer is None or join is None:
        raise InputError(f"{node.name} is not a merged product")
    where, x, out = scope(node), node.inputs[0], node.outputs[0]
    parts = [
        product(edit, name, x, [weight], [], layer.transposed, out.dtype)
        for name, weight in zip(names, join.inputs, strict=True)
    ]
    whole = edit.add("Concat", where, parts, {"axis": -1}, dtype=out.dtype, shape=out.shape)
    edit.replace(out, whole)
    node.outputs.clear()
    node.inputs.clear()
