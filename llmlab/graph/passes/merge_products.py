"""Products that read the same tokens become one: QKV, gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, other, producer, scope
from llmlab.graph.rewrite import Match, Pass


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


class MergeProducts(Pass):
    """Linear layers on the same input → one product and a Split; the weights stay apart until a target joins them."""

    name = "merge_products"

    def find(self, edit: Editor) -> Iterator[Match]:
        groups: dict[tuple[int, bool], list[Linear]] = {}
        for node in edit.surgeon.nodes:
            if (layer := linear(node)) is not None:
                groups.setdefault((id(node.inputs[0]), layer.transposed), []).append(layer)
        for layers in groups.values():
            modules: dict[str, list[Linear]] = {}
            for layer in layers:  # attention and MLP read the same tokens where a model runs them side by side
                modules.setdefault(_module(layer), []).append(layer)
            several = [group for group in modules.values() if len(group) > 1]
            for group in several or [layers]:
                if len(group) > 1:
                    yield Match(node=group[0].node, layers=group)

    def check(self, edit: Editor, match: Match) -> str | None:
        layers: list[Linear] = match.layers
        if len({layer.bias is None for layer in layers}) != 1:
            return "some of the products have a bias and some have none"
        if len({str(layer.weight.dtype) for layer in layers}) != 1:
            return "the weights have different types"
        if len({_module(layer) for layer in layers}) != 1:
            return f"they belong to different modules: {', '.join(scope(layer.node) for layer in layers)}"
        if any(edit.is_output(layer.out) for layer in layers):
            return "one of the products is an output"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        layers: list[Linear] = match.layers
        first = layers[0]
        where = _module(first)
        widths = [layer.width for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        x, dtype = first.node.inputs[0], first.out.dtype
        whole = product(edit, where, x, [layer.weight for layer in layers], biases, first.transposed, dtype)
        sizes = edit.constant(f"{where}/widths", np.asarray(widths, np.int64))
        rows = list(x.shape or ())[:-1]
        parts = edit.add_many("Split", where, [whole, sizes], {"axis": -1}, [(dtype, [*rows, w]) for w in widths])
        for layer, part in zip(layers, parts, strict=True):
            edit.replace(layer.out, part)


def _module(layer: Linear) -> str:
    """The module that holds the layer: `model.layers.0.self_attn`."""
    return scope(layer.node).rpartition(".")[0]
