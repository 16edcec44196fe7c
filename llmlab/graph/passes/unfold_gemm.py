"""Gemm of a linear layer → the product and the sum that every other pass knows."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, operand, scope
from llmlab.graph.passes.norms import fits, vector
from llmlab.graph.rewrite import Match, Pass


class UnfoldGemm(Pass):
    """x @ W + b in one Gemm → MatMul and Add; the weight keeps the layout in which it is stored."""

    name = "unfold_gemm"

    def pattern(self, node: gs.Node) -> Match | None:
        return Match(node=node) if node.op == "Gemm" else None

    def check(self, edit: Editor, match: Match) -> str | None:
        node = match.node
        weight, bias, out = node.inputs[1], operand(node, 2), node.outputs[0]
        if not constant_expression(weight) or len(weight.shape or ()) != 2:
            return "its second operand is no constant matrix"
        if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
            return "it scales or transposes"
        match.width = weight.shape[0 if node.attrs.get("transB", 0) else 1]
        if bias is not None and not fits(bias, match.width):
            return f"its third operand is no constant of shape [{match.width}]"
        return None if out.shape is not None else "its shape is not known"

    def rewrite(self, edit: Editor, match: Match) -> None:
        node, where = match.node, scope(match.node)
        x, weight, bias, out = node.inputs[0], node.inputs[1], operand(node, 2), node.outputs[0]
        if node.attrs.get("transB", 0):
            shape = list(weight.shape)[::-1]
            weight = edit.add("Transpose", where, [weight], {"perm": [1, 0]}, dtype=weight.dtype, shape=shape)
        result = edit.add("MatMul", where, [x, weight], dtype=out.dtype, shape=out.shape)
        if bias is not None:
            result = edit.add("Add", where, [result, vector(edit, bias)], dtype=out.dtype, shape=out.shape)
        edit.replace(out, result)
