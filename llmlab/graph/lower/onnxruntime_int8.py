"""Products of eight-bit weights and activations for ONNX Runtime's CPU: MatMulIntegerToFloat, whose sums are exact integers.

Both sides are uint8 around 128: on processors without VNNI the product of uint8 and int8 saturates.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, operand, producer, scope, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.linear import Linear, linear
from llmlab.graph.lower.onnxruntime_nbits import Blocked
from llmlab.graph.quantized import QuantizedWeight, joined
from llmlab.graph.store.deferred import DeferredValues
from llmlab.graph.store.storage import array

_FLOAT, _UINT8 = np.dtype(np.float32), np.dtype(np.uint8)
_ZERO, _MOST = 128, 127
_LEAST_SCALE = 1e-12
"""Where all numbers are zero."""


def lower_int8(edit: Editor) -> None:
    """DequantizeLinear(x) @ DequantizeLinear(W) (+ bias) → a product of integers, in place.

    x: int8, one scale for the tensor or one for each row. W: int8, one scale for the tensor or one for each channel.
    What is of another kind stays as it is.
    """
    products = _Products(edit)
    for node in list(edit.surgeon.nodes):
        layer = linear(node)
        weight = joined(layer.weight) if layer is not None else None
        if layer is not None and weight is not None and holds(weight, layer):
            products.lower_rounded(layer, weight)
    sort_nodes(edit.surgeon.cleanup())


def for_many_rows(lowered: Graph) -> Graph:
    """A lowered graph for steps of many rows, where products of integers are fastest; the given graph is not changed.

    Each MatMulNBits becomes one: activations are rounded to int8 by rows, and the weight, whatever its grid, again by channels. Weights
    of four bits lose little by it, their own steps being much wider. All other constants are those of the given graph.
    """
    result = lowered.copy()
    result.stands_for |= lowered.stands_for
    edit = Editor(result)
    products = _Products(edit)
    for node in [n for n in edit.surgeon.nodes if n.op == "MatMulNBits"]:
        values = node.inputs[1]._values
        if isinstance(values, Blocked):
            products.lower_wide(node, values.blocks.weight)
    sort_nodes(edit.surgeon.cleanup())
    return result


def holds(weight: QuantizedWeight, layer: Linear) -> bool:
    """Whether a weight is int8 with a scale for each channel or one for all."""
    channels = 0 if layer.transposed else 1
    return weight.dtype == "int8" and not weight.block and (weight.per_tensor or weight.axis == channels)


class _Products:
    """The products of one graph; those that read the same activations share what is made of them."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._zero = edit.constant("int8_zero", np.array(_ZERO, _UINT8))
        self._one = edit.constant("int8_one", np.array(1, np.float32))
        self._part = edit.constant("int8_part", np.array(1 / _MOST, np.float32))
        self._made: dict[int, tuple[gs.Tensor, gs.Tensor, gs.Tensor | None]] = {}

    def lower_rounded(self, layer: Linear, weight: QuantizedWeight) -> None:
        """A product whose activations the graph rounds itself."""
        wide = producer(layer.node.inputs[0], "DequantizeLinear")
        narrow = producer(wide.inputs[0], "QuantizeLinear") if wide is not None else None
        if wide is None or narrow is None or operand(wide, 2) is not None or operand(narrow, 2) is not None:
            return
        x, step = narrow.inputs[:2]
        if np.dtype(narrow.outputs[0].dtype) != np.int8 or len(x.shape or ()) != 2 or wide.inputs[1] is not step:
            return
        where, by_row = scope(narrow), len(step.shape or ()) == 1
        if (by_row and int(narrow.attrs.get("axis", 1)) != 0) or (not by_row and not constant_expression(step)):
            return
        if id(narrow) not in self._made:
            if by_row:
                self._made[id(narrow)] = self._by_row(where, x, self._column(where, step), self._one)
            else:
                self._made[id(narrow)] = (self._round(where, x, step), step, None)
        bias = layer.bias if not self._edit.is_output(layer.node.outputs[0]) else None
        out = layer.out if bias is not None or layer.bias is None else layer.node.outputs[0]
        columns = weight.transposed() if layer.transposed else weight
        self._multiply(layer.node, columns, bias, out, *self._made[id(narrow)])

    def lower_wide(self, node: gs.Node, weight: QuantizedWeight) -> None:
        """A MatMulNBits with `weight` [N, K]."""
        x, name = node.inputs[0], node.inputs[1].name
        if id(x) not in self._made:
            self._made[id(x)] = self._by_row(scope(node), x, self._largest(scope(node), x), self._part)
        values = gs.Constant(f"{name}.int8", Requantized(weight))
        scale = gs.Constant(f"{name}.int8_scale", ChannelScales(weight))
        columns = QuantizedWeight(values, scale, None, 0, 0).transposed()
        self._multiply(node, columns, operand(node, 5), node.outputs[0], *self._made[id(x)])

    def _multiply(
        self,
        node: gs.Node,
        weight: QuantizedWeight,
        bias: gs.Tensor | None,
        out: gs.Tensor,
        x: gs.Tensor,
        step: gs.Tensor,
        column: gs.Tensor | None,
    ) -> None:
        """Let rounded x @ `weight` [K, N] (+ bias) take the place of `out`."""
        edit, where, name, width = self._edit, scope(node), weight.values.name, weight.shape[1]
        values = gs.Constant(edit.name(f"{name}.columns"), Shifted(weight.values, weight.shape))
        scale: gs.Tensor = gs.Constant(edit.name(f"{name}.scales"), _PerChannel(weight.scale, width, _FLOAT))
        zero: gs.Tensor = self._zero
        if weight.zero_point is not None:
            zero = gs.Constant(edit.name(f"{name}.zeros"), _PerChannel(weight.zero_point, width, _UINT8))
        inputs = [x, values, step, scale, self._zero, zero, bias if column is None else None]
        shape, dtype = out.shape, out.dtype
        made = edit.add("MatMulIntegerToFloat", where, inputs, dtype=dtype, shape=shape, domain="com.microsoft")
        if column is not None:
            made = edit.add("Mul", where, [made, column], dtype=dtype, shape=shape)
            if bias is not None:
                made = edit.add("Add", where, [made, bias], dtype=dtype, shape=shape)
        edit.replace(out, made)
        node.outputs.clear()

    def _by_row(
        self, where: str, x: gs.Tensor, column: gs.Tensor, step: gs.Tensor
    ) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
        """x [T, K] over a number of each row [T, 1], rounded to multiples of `step`; the product is multiplied by that number."""
        even = self._edit.add("Div", where, [x, column], dtype=_FLOAT, shape=x.shape)
        return self._round(where, even, step), step, column

    def _round(self, where: str, x: gs.Tensor, step: gs.Tensor) -> gs.Tensor:
        return self._edit.add("QuantizeLinear", where, [x, step, self._zero], dtype=_UINT8, shape=x.shape)

    def _column(self, where: str, step: gs.Tensor) -> gs.Tensor:
        axis = self._edit.constant(f"{where}/axis", np.array([1], np.int64))
        return self._edit.add("Unsqueeze", where, [step, axis], dtype=_FLOAT, shape=[*step.shape, 1])

    def _largest(self, where: str, x: gs.Tensor) -> gs.Tensor:
        """The largest size of each row's numbers, [T, 1]. It may be 0: what such a row is divided by counts for nothing, since its
        products are multiplied by 0 again."""
        edit, rows = self._edit, [x.shape[0], 1]
        size = edit.add("Abs", where, [x], dtype=_FLOAT, shape=x.shape)
        axis = edit.constant(f"{where}/axis", np.array([1], np.int64))
        return edit.add("ReduceMax", where, [size, axis], {"keepdims": 1}, dtype=_FLOAT, shape=rows)


class Shifted(DeferredValues):
    """int8 numbers as uint8 around 128."""

    def __init__(self, values: gs.Constant, shape: tuple[int, ...]) -> None:
        super().__init__(shape, _UINT8)
        self._values, self.sources = values, [values._values]

    def load(self) -> np.ndarray:
        return np.ascontiguousarray(array(self._values)).view(np.uint8) ^ np.uint8(_ZERO)


class _PerChannel(DeferredValues):
    """A scale for each of `width` channels, or a zero point as uint8, also where the weight has one for all."""

    def __init__(self, given: gs.Constant, width: int, dtype: np.dtype) -> None:
        super().__init__((width,), dtype)
        self._given, self.sources = given, [given._values]

    def load(self) -> np.ndarray:
        given = array(self._given).reshape(-1)
        numbers = given.astype(np.int16) + _ZERO if self.dtype == _UINT8 else given
        return np.ascontiguousarray(np.broadcast_to(numbers.astype(self.dtype), self.shape))


class ChannelScales(DeferredValues):
    """The scale of each row of a weight [N, K] that is rounded to int8 again, [N]."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__((weight.shape[0],), _FLOAT)
        self._weight = weight
        self.sources = [weight.values._values, weight.scale._values]

    def load(self) -> np.ndarray:
        return _channel_scales(self._weight.dequantize())


class Requantized(DeferredValues):
    """A weight [N, K], whatever its grid, rounded to int8 by rows."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight.shape, np.dtype(np.int8))
        self._weight = weight
        self.sources = [weight.values._values, weight.scale._values]

    def load(self) -> np.ndarray:
        wide = self._weight.dequantize()
        wide /= _channel_scales(wide)[:, None]
        return np.rint(wide, out=wide).astype(np.int8)


def _channel_scales(wide: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(wide).max(1) / np.float32(_MOST), np.float32(_LEAST_SCALE))
