"""Mixtures of experts in operators that TensorRT has: every expert computes every row, and the routing says what counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand, scope
from llmlab.graph.lower.gated import activate
from llmlab.graph.store.storage import onnx_dtype

_WIDE, _INT32 = np.dtype(np.float32), np.dtype(np.int32)


def expand_experts(edit: Editor, keep_fp32: set[str]) -> None:
    """Replace every MixtureOfExperts node, in place. Right for any routing, a row that names an expert twice or one whose
    result would overflow for a row that it isn't meant for included.

    It computes experts / k times what is asked for and holds experts · tokens · 2 · inner values: for few experts or few
    tokens the weights, which are all read by then anyway, take longer than the products.
    keep_fp32: names of nodes that have to compute in float32; those that weigh and add are added.
    """
    for node in [n for n in edit.surgeon.nodes if n.op == "MixtureOfExperts"]:
        edit.replace(node.outputs[0], _Experts(edit, node).output(keep_fp32))
        node.outputs.clear()


class _Experts:
    def __init__(self, edit: Editor, node: gs.Node) -> None:
        self._edit, self._node, self._where = edit, node, scope(node)
        self._experts = int(node.inputs[3].shape[0])
        self._tokens, self._hidden = node.outputs[0].shape
        self._dtype = np.dtype(node.outputs[0].dtype)

    def output(self, keep_fp32: set[str]) -> gs.Tensor:
        made = self._results()
        count = len(self._edit.surgeon.nodes)
        weight, chosen = self._routing()
        wide = self._cast(made, _WIDE)
        zero = self._constant("zero", np.array(0, np.float32))
        counted = self._add("Mul", self._add("Where", chosen, wide, zero, shape=made.shape), weight, shape=made.shape)
        total = self._reduced("ReduceSum", counted, 0, [self._tokens, self._hidden])
        keep_fp32.update(n.name for n in self._edit.surgeon.nodes[count:])
        return self._cast(total, self._dtype)

    def _results(self) -> gs.Tensor:
        """[experts, T, hidden]: each expert's answer to each row."""
        attrs, (x, _, _, gate_up, down) = self._node.attrs, self._node.inputs[:5]
        first, second = (t if attrs["transposed"] else self._turned(t) for t in (gate_up, down))
        both = self._product(self._unsqueezed(x, 0, [1, *x.shape]), first, operand(self._node, 5))
        return self._product(self._gated(both), second, operand(self._node, 6))

    def _product(self, x: gs.Tensor, weight: gs.Tensor, bias: gs.Tensor | None) -> gs.Tensor:
        shape = [self._experts, self._tokens, int(weight.shape[2])]
        out = self._add("MatMul", x, weight, shape=shape, dtype=self._dtype)
        if bias is None:
            return out
        row = self._unsqueezed(bias, 1, [self._experts, 1, shape[2]])
        return self._add("Add", out, row, shape=shape, dtype=self._dtype)

    def _gated(self, both: gs.Tensor) -> gs.Tensor:
        """`kernels.experts.gated` in ordinary operators."""
        attrs, width = self._node.attrs, int(both.shape[2])
        shape = [*both.shape[:2], width // 2]
        step = 2 if attrs["interleaved"] else 1
        bounds = ((0, width, 2), (1, width, 2)) if step == 2 else ((0, width // 2, 1), (width // 2, width, 1))

        def make(op: str, *inputs: gs.Tensor) -> gs.Variable:
            return self._add(op, *inputs, shape=shape, dtype=self._dtype)

        def number(name: str, given: float) -> gs.Constant:
            return self._constant(name, np.asarray(given, self._dtype))

        gate, up = (
            make("Slice", both, *(self._constant("slice", np.array([n])) for n in (begin, end, 2, step)))
            for begin, end, step in bounds
        )
        if attrs["limit"]:
            high, low = number("limit", attrs["limit"]), number("limit", -attrs["limit"])
            gate, up = make("Min", gate, high), make("Max", make("Min", up, high), low)
        active = activate(self._edit, self._where, attrs["activation"], float(attrs["alpha"]), gate)
        return make("Mul", active, make("Add", up, number("beta", attrs["beta"])) if attrs["beta"] else up)

    def _routing(self) -> tuple[gs.Variable, gs.Variable]:
        """What each expert's answer to each row counts, and whether the row asked for it: both [experts, T, 1]."""
        index, weight = self._node.inputs[1:3]
        choices = index.shape[1]
        places = self._unsqueezed(self._cast(index, _INT32), 0, [1, self._tokens, choices])
        experts = self._constant("experts", np.arange(self._experts, dtype=np.int32).reshape(-1, 1, 1))
        shape = [self._experts, self._tokens, choices]
        hits = self._cast(self._add("Equal", places, experts, shape=shape, dtype=np.dtype(bool)), _WIDE)
        counts = self._unsqueezed(self._cast(weight, _WIDE), 0, [1, self._tokens, choices])
        column = [self._experts, self._tokens, 1]
        total = self._reduced("ReduceSum", self._add("Mul", hits, counts, shape=shape), 2, column, keepdims=1)
        half = self._constant("half", np.array(0.5, np.float32))
        asked = self._reduced("ReduceSum", hits, 2, column, keepdims=1)
        return total, self._add("Greater", asked, half, shape=column, dtype=np.dtype(bool))

    def _add(self, op: str, *inputs: gs.Tensor, shape: Any, dtype: np.dtype = _WIDE, **attrs: Any) -> gs.Variable:
        return self._edit.add(op, self._where, inputs, attrs, dtype=dtype, shape=shape)

    def _reduced(self, op: str, x: gs.Tensor, axis: int, shape: list[Any], keepdims: int = 0) -> gs.Variable:
        axes = self._constant("axis", np.array([axis]))
        return self._add(op, x, axes, shape=shape, dtype=x.dtype, keepdims=keepdims)

    def _unsqueezed(self, x: gs.Tensor, axis: int, shape: list[Any]) -> gs.Variable:
        axes = self._constant("axis", np.array([axis]))
        return self._add("Unsqueeze", x, axes, shape=shape, dtype=x.dtype)

    def _turned(self, weight: gs.Tensor) -> gs.Variable:
        experts, width, depth = weight.shape
        return self._add("Transpose", weight, shape=[experts, depth, width], dtype=weight.dtype, perm=[0, 2, 1])

    def _cast(self, x: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
        if x.dtype == dtype:
            return x
        return self._add("Cast", x, shape=x.shape, dtype=dtype, to=onnx_dtype(dtype))

    def _constant(self, name: str, array: np.ndarray) -> gs.Constant:
        return self._edit.constant(f"{self._where}/{name}", array)
