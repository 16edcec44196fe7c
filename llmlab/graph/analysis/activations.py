"""Which activation a few elementwise nodes compute: found out by computing it, however it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.edit import operand, scalar
from llmlab.kernels.activations import ACTIVATIONS, gelu, gelu_tanh, relu, sigmoid, silu

_MOST_NODES = 16
_TOLERANCE = 1e-6  # constants are float32; gelu and its tanh approximation differ by 5e-4
_GRID: NDArray[np.floating] = np.linspace(-9, 9, 145)
_OPS: Mapping[str, Callable[..., NDArray[np.floating]]] = {
    "Add": np.add,
    "Div": np.divide,
    "Erf": np.vectorize(math.erf, otypes=[np.float64]),
    "Exp": np.exp,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "Reciprocal": np.reciprocal,
    "Relu": relu,
    "Sigmoid": sigmoid,
    "Sub": np.subtract,
    "Tanh": np.tanh,
}


@dataclass(frozen=True)
class Activation:
    """One of `kernels.activations.ACTIVATIONS`; `alpha` is silu's."""

    kind: str
    alpha: float = 1.0


def argument(node: gs.Node) -> gs.Tensor | None:
    """The last tensor x that both operands of `node`, a product or a quotient, are elementwise functions of.

    Scalars that multiply the product afterwards, such as gelu's 1/2, are seen through.
    """
    for _ in range(_MOST_NODES):
        variables = [t for t in node.inputs if scalar(t) is None]
        if node.op not in ("Mul", "Div"):
            return None
        if len(variables) == 2:
            left, right = _reachable(variables[0]), _reachable(variables[1])
            common = [t for key, t in left.items() if key in right]
            return common[0] if common else None
        if len(variables) != 1 or not variables[0].inputs:
            return None
        node = variables[0].inputs[0]
    return None


def _reachable(tensor: gs.Tensor, end: gs.Tensor | None = None) -> dict[int, gs.Tensor]:
    """`tensor` and what it is an elementwise function of, nearest first; nothing from behind `end`."""
    found, pending = {id(tensor): tensor}, [tensor]
    while pending and len(found) < _MOST_NODES:
        current = pending.pop(0)
        known = current is not end and current.inputs and current.inputs[0].op in (*_OPS, "Gelu")
        maker = current.inputs[0] if known else None
        for t in maker.inputs if maker is not None else ():
            if scalar(t) is None and id(t) not in found:
                found[id(t)] = t
                pending.append(t)
    return found


def curve(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Whether more than sums, products and powers lies between `x` and `tensor`."""
    makers = [t.inputs[0] for t in _reachable(tensor, x).values() if t is not x and t.inputs]
    return any(maker.op in ("Erf", "Exp", "Sigmoid", "Tanh") for maker in makers)


def activation_of(tensor: gs.Tensor, x: gs.Tensor) -> Activation | None:
    """The activation that makes `tensor` of `x`, None where it is none of those known or depends on something else."""
    with np.errstate(all="ignore"):
        found = _evaluate(tensor, x, {id(x): _GRID})
    if found is None or found.shape != _GRID.shape or not np.all(np.isfinite(found)):
        return None
    for kind in ("gelu", "gelu_tanh", "relu", "sigmoid"):
        if _equal(found, ACTIVATIONS[kind](_GRID, 1.0)):
            return Activation(kind)
    share = float(np.interp(1.0, _GRID, found))  # x = 1 is on the grid: sigmoid(alpha), if it is a silu
    if 0 < share < 1:
        alpha = round(math.log(share / (1 - share)), 5)
        if alpha and _equal(found, silu(_GRID, alpha)):
            return Activation("silu", alpha)
    return None


def _equal(found: NDArray[np.floating], expected: NDArray[np.floating]) -> bool:
    return bool(np.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))


def _evaluate(tensor: gs.Tensor, x: gs.Tensor, known: dict[int, Any]) -> NDArray[np.floating] | None:
    if id(tensor) in known:
        return known[id(tensor)]
    constant = scalar(tensor)
    if constant is not None:
        return np.asarray(constant)
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or len(known) > _MOST_NODES or (node.op not in _OPS and node.op != "Gelu"):
        return None
    inputs = [_evaluate(t, x, known) for i in range(len(node.inputs)) if (t := operand(node, i)) is not None]
    if any(i is None for i in inputs):
        return None
    if node.op == "Gelu":
        result = (gelu_tanh if node.attrs.get("approximate") == "tanh" else gelu)(np.asarray(inputs[0]))
    else:
        result = _OPS[node.op](*inputs)
    known[id(tensor)] = result
    return result
