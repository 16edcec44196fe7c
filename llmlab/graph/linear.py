"""Linear layers: what they are in a graph, and the nodes of one whose weight is joined from several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, other, producer


@dataclass(frozen=True)
class Linear:
    """x @ W + b: `weight` as it is stored, [N, K] where `transposed` and else [K, N]; `bias` [N] or None; `out` the
    last tensor of it."""

    node: gs.Node
    weight: gs.Tensor
    transposed: bool
    bias: gs.Tensor | None
    out: gs.Tensor

    @property
    def width(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])

    @property
    def depth(self) -> int:
        return int(self.weight.shape[1 if self.transposed else 0])


def linear(node: gs.Node) -> Linear | None:
    """The linear layer whose product is `node`, if its weight is a constant matrix."""
    if node.op != "MatMul" or len(node.inputs[1].shape or ()) != 2:
        return None
    turn = producer(node.inputs[1], "Transpose")
    weight = node.inputs[1] if turn is None else turn.inputs[0]
    if not constant_expression(weight):
        return None
    out = node.outputs[0]
    add = out.outputs[0] if len(out.outputs) == 1 and out.outputs[0].op == "Add" else None
    bias = other(add, out) if add is not None else None
    if add is None or bias is None or not constant_expression(bias) or len(bias.shape or ()) != 1:
        return Linear(node, weight, turn is not None, None, out)
    return Linear(node, weight, turn is not None, bias, add.outputs[0])


def is_embedding(node: gs.Node, hidden: int) -> bool:
    """Whether `node` looks tokens or positions up among the weights, and not in a RoPE table."""
    if node.op != "Gather" or not constant_expression(node.inputs[0]):
        return False
    return node.inputs[1].name == "input_ids" or list(node.inputs[0].shape or ())[-1:] == [hidden]


def product(
    edit: Editor,
    where: str,
    x: gs.Tensor,
    weights: list[gs.Tensor],
    biases: list[gs.Tensor],
    transposed: bool,
    dtype: np.dtype,
) -> gs.Tensor:
    """Nodes for x @ W + b, W and b being the joined `weights` (stored as `Linear` says) and `biases` (none or as many)."""

    def joined(parts: list[gs.Tensor], axis: int) -> gs.Tensor:
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(int(t.shape[axis]) for t in parts)
        return edit.add("Concat", where, parts, {"axis": axis}, dtype=parts[0].dtype, shape=shape)

    weight = joined(weights, 0 if transposed else 1)
    if transposed:
        shape = list(weight.shape)[::-1]
        weight = edit.add("Transpose", where, [weight], {"perm": [1, 0]}, dtype=weight.dtype, shape=shape)
    shape = [*list(x.shape or ())[:-1], weight.shape[1]]
    out = edit.add("MatMul", where, [x, weight], dtype=dtype, shape=shape)
    return edit.add("Add", where, [out, joined(biases, 0)], dtype=dtype, shape=shape) if biases else out
