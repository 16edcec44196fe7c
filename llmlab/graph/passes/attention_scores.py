"""What attention in primitives does between q · kᵀ and its softmax: scale, softcap, mask, sinks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.evaluate import PositionFunction
from llmlab.graph.edit import Editor, constant_expression, ints, operand, producer, scalar, value
from llmlab.graph.store.storage import onnx_dtype


def constant_factor(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """(x, c) where a Mul or Div computes x · c."""
    a, b = node.inputs
    if (c := scalar(b)) is not None:
        if node.op == "Mul":
            return a, c
        return (a, 1 / c) if c else None
    return (b, c) if node.op == "Mul" and (c := scalar(a)) is not None else None


def per_head(tensor: gs.Tensor, heads: int) -> gs.Tensor | None:
    """The constant of one number a head behind a [batch, heads, query, 1] tensor."""
    if len(tensor.shape or ()) != 4 or tensor.shape[1] != heads or tensor.shape[3] != 1:
        return None
    expand = producer(tensor, "Expand")
    tensor = expand.inputs[0] if expand is not None else tensor
    if list(tensor.shape or ()) != [1, heads, 1, 1] or not constant_expression(tensor):
        return None
    while (node := producer(tensor, "Reshape", "Unsqueeze")) is not None:  # their order can't change: they are a row
        tensor = node.inputs[0]
    return tensor if len(tensor.shape or ()) == 1 or value(tensor) is not None else None


@dataclass
class Scores:
    """What lies between q · kᵀ and the softmax: `steps` in order, each with the input that carries the scores."""

    product: gs.Node
    steps: list[gs.Node]
    carried: list[int]
    sink: gs.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    masked_from: int = field(default=0)
    """The first step that adds or hides; from there on steps are the mask's arithmetic."""

    def read(self, factor: float) -> str | None:
        """Find scale and softcap, with `factor` on q and k; or the reason why they aren't there."""
        inner, capped = factor, False
        self.masked_from = len(self.steps)
        outer = 1.0
        for i, node in enumerate(self.steps):
            if node.op in ("Mul", "Div"):
                by = constant_factor(node)
                if by is None:
                    return f"{node.name} scales the scores by what is no constant"
                inner, outer = (inner, outer * by[1]) if capped else (inner * by[1], outer)
            elif node.op == "Tanh":
                if capped or self.masked_from < i:
                    return f"{node.name} bends scores that are masked or bent already"
                capped = True
            elif node.op in ("Add", "Sub", "Where"):
                self.masked_from = min(self.masked_from, i)
        if capped and outer <= 0:
            return f"its softcap is {outer}"
        self.scale, self.softcap = (inner * outer, outer) if capped else (inner, 0.0)
        return None if math.isfinite(self.scale) and self.scale else f"its scale is {self.scale}"

    def mask(self, edit: Editor, where: str, heads: int) -> gs.Tensor | None:
        """The mask: the steps that add and hide, replayed on scores of zero."""
        steps = list(zip(self.steps, self.carried, strict=True))[self.masked_from :]
        if not steps:
            return None
        before, dtype = steps[0][0].inputs[steps[0][1]], self.product.outputs[0].dtype or np.dtype(np.float32)
        merged_at_last = len(self.steps[-1].outputs[0].shape or ()) == 3
        zeros: gs.Tensor
        if merged_at_last or any(node.op == "Reshape" for node, _ in steps):
            sizes = _sizes(edit, where, heads, merged=len(before.shape or ()) == 3)
            zero = gs.Constant("zero", np.zeros(1, dtype))
            zeros = edit.add("ConstantOfShape", where, [sizes], {"value": zero}, dtype=dtype, shape=before.shape)
        else:
            zeros = edit.constant(f"{where}/zero", np.zeros((), dtype))
        tensor = zeros
        for node, carried in steps:
            inputs = [tensor if i == carried else t for i, t in enumerate(node.inputs)]
            tensor = edit.add(node.op, where, inputs, node.attrs, dtype=node.outputs[0].dtype, shape=None)
        if merged_at_last:
            target = _sizes(edit, where, heads, merged=False)
            tensor = edit.add("Reshape", where, [tensor, target], dtype=tensor.dtype, shape=None)
        if tensor.dtype != dtype:
            tensor = edit.add("Cast", where, [tensor], {"to": onnx_dtype(dtype)}, dtype=dtype, shape=None)
        return tensor


def _sizes(edit: Editor, where: str, heads: int, *, merged: bool) -> gs.Tensor:
    """The shape of the scores, as a tensor: [batch, heads, sequence, sequence], or its first two merged."""
    ids = next(t for t in edit.surgeon.inputs if t.name == "input_ids")
    int64 = np.dtype(np.int64)
    batch, length = (
        edit.add("Shape", where, [ids], {"start": i, "end": i + 1}, dtype=int64, shape=[1]) for i in (0, 1)
    )
    count = edit.constant(f"{where}/heads", np.array([heads], np.int64))
    leading = [edit.add("Mul", where, [batch, count], dtype=int64, shape=[1])] if merged else [batch, count]
    return edit.add("Concat", where, [*leading, length, length], {"axis": 0}, dtype=int64, shape=[3 + (not merged)])


def trace_back(tensor: gs.Tensor) -> Scores | str:
    """From the softmax back to the product of q and k, along the scores; or what is in the way."""
    steps: list[gs.Node] = []
    carried: list[int] = []
    sink = None
    while (node := producer(tensor)) is not None:
        if node.op == "MatMul":
            return Scores(node, steps[::-1], carried[::-1], sink)
        if node.op == "Sub" and _is_own_maximum(node.inputs[1], node.inputs[0]):
            tensor = node.inputs[0]  # a softmax doesn't see it
            continue
        if node.op == "Concat" and len(node.inputs) == 2 and not steps and sink is None:
            if node.attrs.get("axis") not in (-1, len(node.outputs[0].shape or ()) - 1):
                return f"{node.name} joins its scores along another axis than the keys'"
            tensor, sink = node.inputs
            continue
        if node.op in ("Cast", "Reshape", "Tanh"):
            along = [0]
        elif node.op in ("Add", "Sub", "Mul", "Div", "Where"):
            along = [i for i, t in enumerate(node.inputs) if not _aside(t)]
        else:
            return f"{node.name} ({node.op}) is between its product and its softmax"
        if len(along) != 1 or (node.op in ("Sub", "Div") and along != [0]) or (node.op == "Where" and along == [0]):
            return f"{node.name} joins the scores with what depends on the tokens"
        steps.append(node)
        carried.extend(along)
        tensor = node.inputs[along[0]]
    return "its scores are no product"


def _aside(tensor: gs.Tensor) -> bool:
    """Whether a tensor depends on positions and sizes alone."""
    return isinstance(tensor, gs.Constant) or PositionFunction([tensor]).dependence() is None


def _is_own_maximum(maximum: gs.Tensor, x: gs.Tensor) -> bool:
    node = producer(maximum, "ReduceMax")
    if node is None or node.inputs[0] is not x or not node.attrs.get("keepdims", 1):
        return False
    return ints(operand(node, 1)) in ([-1], [len(x.shape or ()) - 1])
