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
    """x @ Wᵀ + b: `weight` [N, K] before its Transpose, `bias` [N] or None, `out` the last tensor of it."""

    node: gs.Node
    weight: gs.Tensor
    bias: gs.Tensor | None
    out: gs.Tensor


def linear(node: gs.Node) -> Linear | None:
    """The linear layer whose product is `node`, if its weight is a transposed constant [N, K]."""
    if node.op != "MatMul":
        return None
    transpose = producer(node.inputs[1], "Transpose")
    if (
        transpose is None
        or list(transpose.attrs.get("perm", ())) != [1, 0]
        or not constant_expression(transpose.inputs[0])
    ):
        return None
    weight, out = transpose.inputs[0], node.outputs[0]
    add = out.outputs[0] if len(out.outputs) == 1 and out.outputs[0].op == "Add" else None
    bias = other(add, out) if add is not None else None
    if add is None or bias is None or not constant_expression(bias) or len(bias.shape or ()) != 1:
        return Linear(node, weight, None, out)
    return Linear(node, weight, bias, add.outputs[0])


class MergeProducts(Pass):
    """Linear layers on the same input → one product and a Split; the weights stay apart until a target joins them."""

    name = "merge_products"

    def find(self, edit: Editor) -> Iterator[Match]:
        groups: dict[int, list[Linear]] = {}
        for node in edit.surgeon.nodes:
            if (layer := linear(node)) is not None:
                groups.setdefault(id(node.inputs[0]), []).append(layer)
        for layers in groups.values():
            if len(layers) > 1:
                yield Match(node=layers[0].node, layers=layers)

    def check(self, edit: Editor, match: Match) -> str | None:
        layers: list[Linear] = match.layers
        if len({layer.bias is None for layer in layers}) != 1:
            return "some of the products have a bias and some have none"
        if len({str(layer.weight.dtype) for layer in layers}) != 1:
            return "the weights have different types"
        if len({scope(layer.node).rpartition(".")[0] for layer in layers}) != 1:
            return f"they belong to different modules: {', '.join(scope(layer.node) for layer in layers)}"
        if any(edit.is_output(layer.out) for layer in layers):
            return "one of the products is an output"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        layers: list[Linear] = match.layers
        first = layers[0]
        where = scope(first.node).rpartition(".")[0]
        widths = [int(layer.weight.shape[0]) for layer in layers]
        depth, dtype, x = first.weight.shape[1], first.weight.dtype, first.node.inputs[0]
        rows = list(x.shape or ())[:-1]
        joined = edit.add(
            "Concat", where, [layer.weight for layer in layers], {"axis": 0}, dtype=dtype, shape=[sum(widths), depth]
        )
        turned = edit.add("Transpose", where, [joined], {"perm": [1, 0]}, dtype=dtype, shape=[depth, sum(widths)])
        product = edit.add("MatMul", where, [x, turned], dtype=first.out.dtype, shape=[*rows, sum(widths)])
        if first.bias is not None:
            bias = edit.add(
                "Concat",
                where,
                [layer.bias for layer in layers],
                {"axis": 0},
                dtype=first.bias.dtype,
                shape=[sum(widths)],
            )
            product = edit.add("Add", where, [product, bias], dtype=first.out.dtype, shape=[*rows, sum(widths)])
        sizes = edit.constant(f"{where}/widths", np.asarray(widths, np.int64))
        parts = edit.add_many(
            "Split", where, [product, sizes], {"axis": -1}, [(first.out.dtype, [*rows, w]) for w in widths]
        )
        for layer, part in zip(layers, parts, strict=True):
            edit.replace(layer.out, part)
