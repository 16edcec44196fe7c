"""Constant expressions in front of weights (casts, joins, transposes), computed while the weights are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.graph.edit import constant_expression
from llmlab.graph.store.storage import DeferredValues, array, loaded

Attrs = dict[str, Any]
_STRIP = 64  # rows that are turned together: their elements share cache lines on both sides


def _transposed(matrix: np.ndarray, perm: list[int] | None) -> np.ndarray:
    """A transposed array; a matrix in strips, three times as fast as the copy that NumPy makes of its view."""
    if matrix.ndim != 2 or perm not in (None, [1, 0]):
        return np.transpose(matrix, perm)
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for begin in range(0, len(matrix), _STRIP):
        out[:, begin : begin + _STRIP] = matrix[begin : begin + _STRIP].T
    return out


_OPS: dict[str, Callable[[Attrs, list[np.ndarray]], np.ndarray]] = {
    "Add": lambda attrs, i: i[0] + i[1],
    "Cast": lambda attrs, i: i[0].astype(onnx.helper.tensor_dtype_to_np_dtype(attrs["to"])),
    "Concat": lambda attrs, i: np.concatenate(i, attrs["axis"]),
    "Identity": lambda attrs, i: i[0],
    "Mul": lambda attrs, i: i[0] * i[1],
    "Reshape": lambda attrs, i: i[0].reshape(i[1]),
    "Transpose": lambda attrs, i: _transposed(i[0], attrs.get("perm")),
    "Unsqueeze": lambda attrs, i: np.expand_dims(i[0], tuple(int(axis) for axis in i[1])),
}


class Expression(DeferredValues):
    """A constant expression, evaluated each time it is asked for and never kept. It outlives the nodes it was made of."""

    def __init__(self, tensor: gs.Variable) -> None:
        super().__init__(tuple(int(d) for d in tensor.shape), np.dtype(tensor.dtype))
        self._compute = _compile(tensor)
        self.sources = [t._values for t in _leaves(tensor)]

    def load(self) -> np.ndarray:
        return np.asarray(self._compute(), self.dtype)


def _leaves(tensor: gs.Tensor) -> list[gs.Constant]:
    """The constants that an expression is made of."""
    return [tensor] if isinstance(tensor, gs.Constant) else [c for t in tensor.inputs[0].inputs for c in _leaves(t)]


def _compile(tensor: gs.Tensor) -> Callable[[], np.ndarray]:
    if isinstance(tensor, gs.Constant):
        values = tensor._values
        return lambda: loaded(values)
    node = tensor.inputs[0]
    operator, attrs, inputs = _OPS[node.op], dict(node.attrs), [_compile(t) for t in node.inputs]
    return lambda: operator(attrs, [compute() for compute in inputs])


def evaluate(tensor: gs.Tensor) -> np.ndarray:
    """The values of a constant or of an expression that `can_evaluate`; computed, not kept."""
    return array(tensor) if isinstance(tensor, gs.Constant) else Expression(tensor).load()


def can_evaluate(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a constant, or made of constants by operators that are known here."""
    if isinstance(tensor, gs.Constant):
        return True
    shape: Any = tensor.shape
    known = (
        shape is not None
        and all(isinstance(d, int) for d in shape)
        and tensor.dtype is not None
        and not isinstance(tensor.dtype, int)
    )
    return bool(
        known
        and tensor.inputs
        and tensor.inputs[0].op in _OPS
        and all(can_evaluate(t) for t in tensor.inputs[0].inputs)
    )


def defer_weights(surgeon: gs.Graph) -> None:
    """Replace each constant expression that a node reads by a constant computed when it is written, in place.

    Peak memory stays at one tensor; an expression with several readers, such as a tied embedding, is written once.
    What has an operator that isn't known here is left as nodes, for the runtime to fold.
    """
    made: dict[int, gs.Constant] = {}
    for node in list(surgeon.nodes):
        if all(constant_expression(t) for t in node.inputs) and node.inputs:
            continue  # inside an expression
        for i, tensor in enumerate(node.inputs):
            if (
                isinstance(tensor, gs.Variable)
                and tensor.inputs
                and constant_expression(tensor)
                and can_evaluate(tensor)
            ):
                if id(tensor) not in made:
                    made[id(tensor)] = gs.Constant(f"{tensor.name}.folded", Expression(tensor))
                node.inputs[i] = made[id(tensor)]
    surgeon.cleanup()
