"""Quantized products as TensorRT's parsers want them: one DequantizeLinear of the weight as [K, N], zero points spelled out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.edit import Editor, scope
from llmlab.graph.linear import linear
from llmlab.graph.quantized import QuantizedWeight, joined, quantized
from llmlab.graph.store.deferred import DeferredValues
from llmlab.graph.store.storage import array

BLOCKED = ("int4", "float8_e4m3fn")
"""Types of weights in which numbers of a row may share a scale by groups."""


def quantized_products(edit: Editor, dialect: int) -> None:
    """Bring every quantized weight and activation into the form that TensorRT fuses with its product, in place.

    dialect: the ONNX opset that the parser reads. Raises UnsupportedModelError that names the node, and a target that can, for what
    TensorRT has not: zero points, scales that are computed in the step, int8 by groups, and on old ones fp8 and int4.
    """
    for node in list(edit.surgeon.nodes):
        if node.op == "QuantizeLinear":
            _check_type(node, np.dtype(node.outputs[0].dtype).name, 0, dialect)
            _activation(edit, node)
        layer = linear(node)
        weight = joined(layer.weight) if layer is not None else None
        if layer is not None and weight is not None:
            _check_type(node, weight.dtype, weight.block, dialect)
            _check_weight(node, weight)
            found = weight.transposed() if layer.transposed else weight
            node.inputs[1] = _without_zero(found).add(edit, scope(node))
    edit.surgeon.cleanup()
    for node in [n for n in edit.surgeon.nodes if n.op == "DequantizeLinear"]:
        out = node.outputs[0]
        if (alone := quantized(out)) is not None and any(reader.op != "MatMul" for reader in out.outputs):
            edit.replace(out, gs.Constant(edit.name(f"{out.name}.wide"), _Widened(alone, np.dtype(out.dtype))))


class _Widened(DeferredValues):
    """What a quantized weight stands for, where its reader (experts, an embedding) wants it wide."""

    def __init__(self, weight: QuantizedWeight, dtype: np.dtype) -> None:
        super().__init__(weight.shape, dtype)
        self._weight = weight

    def load(self) -> np.ndarray:
        return self._weight.dequantize().astype(self.dtype)


def _activation(edit: Editor, node: gs.Node) -> None:
    """Its type as a zero point, which parsers of all versions know."""
    if not isinstance(node.inputs[1], gs.Constant):
        raise UnsupportedModelError(
            f"{node.name}: a scale for each token, which TensorRT can't compute in a step: choose static activations "
            "(int8_w8a8, int8_smoothquant, fp8), or target onnxruntime"
        )
    if node.attrs.pop("output_dtype", None) is None:
        return
    kind = np.dtype(node.outputs[0].dtype)
    node.inputs = [*node.inputs[:2], gs.Constant(edit.name(f"{node.name}.zero_point"), _Zero((), kind))]


def _check_type(node: gs.Node, dtype: str, block: int, dialect: int) -> None:
    since = 21 if block or dtype == "int4" else 19 if dtype == "float8_e4m3fn" else 0
    if dialect < since:
        what = f"{dtype} by groups" if block else dtype
        raise UnsupportedModelError(
            f"{node.name}: {what}, which came with ONNX opset {since}, and this TensorRT reads {dialect}: choose int8 with a scale "
            "a row, or a newer TensorRT, or target onnxruntime"
        )


def _check_weight(node: gs.Node, weight: QuantizedWeight) -> None:
    if weight.zero_point is not None:
        _refuse_zero_point(node.name, weight.zero_point)
    if weight.block and weight.dtype not in BLOCKED:
        raise UnsupportedModelError(
            f"{node.name}: {weight.dtype} weights by groups, which TensorRT has not: choose a scale a row (group=0), or target onnxruntime"
        )


def _refuse_zero_point(name: str, zero_point: gs.Constant) -> None:
    if array(zero_point).astype(np.float32).any():
        raise UnsupportedModelError(
            f"{name}: weights with zero points, which TensorRT has not: choose symmetric ones, or target onnxruntime"
        )


def _without_zero(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, zero_point=None)


class _Zero(DeferredValues):
    """Zero, in types that the surgeon can't write from an array."""

    def load(self) -> np.ndarray:
        return np.zeros(self.shape, np.float32).astype(self.dtype)
