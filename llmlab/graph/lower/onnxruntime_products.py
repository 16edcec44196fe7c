"""Linear layers for ONNX Runtime's CPU: one Gemm each, on the weight as it is stored."""

from __future__ import annotations

from llmlab.graph.edit import Editor, ints, operand, other, producer, scope, sort_nodes
from llmlab.graph.linear import linear, product
from llmlab.graph.quantized import joined


def split_products(edit: Editor, keep: set[int]) -> None:
    """Undo merged products whose Split survives: apart they are as fast here, and the Split copies. Those with quantized weights stay
    merged: where few rows are multiplied, one product less to start is worth more than the copy."""
    for node in list(edit.surgeon.nodes):
        last = producer(node.inputs[0], "MatMul", "Add") if node.op == "Split" else None
        if last is None or id(last) in keep or len(last.outputs[0].outputs) != 1:
            continue
        makers = [last] if last.op == "MatMul" else [p for t in last.inputs if (p := producer(t, "MatMul"))]
        layer = next((found for maker in makers if (found := linear(maker)) is not None), None)
        if layer is None or layer.out is not node.inputs[0]:
            continue
        if joined(layer.weight) is not None:
            continue
        weights = producer(layer.weight, "Concat")
        biases = producer(layer.bias, "Concat") if layer.bias is not None else None
        if weights is None or (layer.bias is not None and biases is None):
            continue
        if ints(operand(node, 1)) != [int(t.shape[0 if layer.transposed else 1]) for t in weights.inputs]:
            continue
        for i, (weight, old) in enumerate(zip(weights.inputs, list(node.outputs), strict=True)):
            bias = [] if biases is None else [biases.inputs[i]]
            part = product(edit, scope(node), layer.node.inputs[0], [weight], bias, layer.transposed, old.dtype)
            edit.replace(old, part)
    sort_nodes(edit.surgeon.cleanup())


def lower_products(edit: Editor) -> None:
    """x @ W (+ bias or residual) → Gemm, which reads W as the checkpoint stores it and adds for free."""
    for node in list(edit.surgeon.nodes):
        layer = linear(node)
        x = node.inputs[0] if layer is not None else None
        if (
            layer is None
            or x is None
            or len(x.shape or ()) != 2
            or (edit.is_output(node.outputs[0]) and layer.bias is not None)
        ):
            continue
        addend, out = layer.bias, layer.out
        if addend is None and len(out.outputs) == 1 and out.outputs[0].op == "Add" and not edit.is_output(out):
            add = out.outputs[0]
            residual = other(add, out)
            if residual is not out and list(residual.shape or ()) == list(out.shape or ()):
                addend, out = residual, add.outputs[0]
        fused = edit.add(
            "Gemm",
            scope(node),
            [x, layer.weight, addend],
            {"transB": int(layer.transposed)},
            dtype=out.dtype,
            shape=out.shape,
        )
        edit.replace(out, fused)
