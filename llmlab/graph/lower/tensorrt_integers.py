"""Integers in products: weights of int8 and int4 as kernels read them, and rows that are rounded in the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, producer
from llmlab.graph.linear import Linear
from llmlab.graph.narrow import narrow_scale
from llmlab.graph.quantized import QuantizedWeight, joined
from llmlab.graph.store.deferred import DeferredValues
from llmlab.graph.store.storage import array
from llmlab.kernels.gpu.launch_product import GROUPS, ProductKind
from llmlab.kernels.packing import pack_weight

_COLUMNS = {"int8": 16, "int4": 32}  # K is a multiple of


@dataclass(frozen=True)
class IntegerWeight:
    """A weight [N, K] of int8 or int4 with a scale for each row, or for each `group` columns of a row."""

    weight: QuantizedWeight

    @property
    def dtype(self) -> str:
        return self.weight.dtype

    @property
    def group(self) -> int:
        return self.weight.block

    @property
    def by_row(self) -> bool:
        """Whether it is int8 with one scale a row, which rows of int8 can be multiplied by."""
        return self.dtype == "int8" and not self.group

    def constants(self, edit: Editor, where: str, *, as_they_are: bool) -> tuple[gs.Constant, gs.Constant]:
        """Values as the kernels read them, and scales in float16; computed when they are written. as_they_are: beside int8 rows."""
        values = gs.Constant(edit.name(f"{where}/{self.dtype}"), _Laid(self.weight, as_they_are))
        return values, gs.Constant(edit.name(f"{where}/scale"), _Scales(self.weight.scale))


def integer_weight(layer: Linear) -> IntegerWeight | None:
    """The weight of a linear layer, where it is one that kernels read."""
    found = joined(layer.weight)
    if found is None or found.zero_point is not None or found.dtype not in _COLUMNS or found.per_tensor:
        return None
    if not layer.transposed:
        found = found.transposed()
    depth = found.shape[1]
    scaled = (
        found.axis == 1 and found.block in GROUPS[found.dtype] and depth % found.block == 0
        if found.block
        else found.axis == 0
    )
    return IntegerWeight(found) if scaled and depth % _COLUMNS[found.dtype] == 0 else None


def behind_casts(tensor: gs.Tensor) -> gs.Tensor:
    """What a tensor was before Casts."""
    while (cast := producer(tensor, "Cast")) is not None:
        tensor = cast.inputs[0]
    return tensor


def rounded_rows(x: gs.Tensor) -> gs.Tensor | None:
    """What `x` was before its rows were rounded to int8, each by its largest number; None where that isn't what it is."""
    wide = producer(behind_casts(x), "DequantizeLinear")
    narrow = producer(wide.inputs[0], "QuantizeLinear") if wide is not None else None
    if wide is None or narrow is None or wide.attrs.get("axis") != 0 or narrow.attrs.get("axis") != 0:
        return None
    if narrow.outputs[0].dtype != np.int8 or wide.inputs[1] is not narrow.inputs[1] or len(narrow.inputs) > 2:
        return None
    step = narrow.inputs[1]
    for op in ("Max", "Div", "ReduceMax", "Abs"):
        made = producer(step, op)
        if made is None:
            return None
        step = made.inputs[0]
    return behind_casts(step) if step is narrow.inputs[0] else None


class _Laid(DeferredValues):
    """The integers of a weight as kernels read them."""

    def __init__(self, weight: QuantizedWeight, as_they_are: bool) -> None:
        rows, depth = weight.shape
        self._kind = ProductKind(
            depth, rows, "float16", "float16", weight.dtype, weight.block, x="int8" if as_they_are else ""
        )
        super().__init__(self._kind.weight_shape, np.dtype(np.int8))
        self._values = weight.values
        self.sources = [weight.values._values]

    def load(self) -> np.ndarray:
        return pack_weight(self._kind, array(self._values).astype(np.int8))


class _Scales(DeferredValues):
    def __init__(self, scale: gs.Constant) -> None:
        super().__init__(tuple(int(d) for d in scale.shape), np.dtype(np.float16))
        self.sources = [scale._values]
        self._scale = scale

    def load(self) -> np.ndarray:
        return narrow_scale(array(self._scale), np.dtype(np.float16))


class Dequantized(DeferredValues):
    """What a quantized table stands for, in a type of floats; computed when it is written."""

    def __init__(self, weight: QuantizedWeight, dtype: np.dtype) -> None:
        super().__init__(weight.shape, np.dtype(dtype))
        self.sources = [weight.values._values]
        self._weight = weight

    def load(self) -> np.ndarray:
        return self._weight.dequantize().astype(self.dtype)
