"""A residual's sum and the norm behind it as one operator of ONNX Runtime."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, producer, scope


def fuse_residual_norms(edit: Editor) -> None:
    """Add, RMSNormalization → SkipSimplifiedLayerNormalization, whose other output is the sum; in place."""
    for node in [n for n in edit.surgeon.nodes if n.op == "RMSNormalization"]:
        add = producer(node.inputs[0], "Add")
        out = node.outputs[0]
        if add is None or edit.is_output(out) or edit.is_output(add.outputs[0]):
            continue
        total = add.outputs[0]
        same = [list(t.shape or ()) == list(total.shape or ()) for t in add.inputs]
        if not all(same) or len(total.shape) != 2 or node.attrs.get("axis", -1) not in (-1, 1):
            continue
        if any(isinstance(t, gs.Constant) for t in add.inputs):
            continue
        outputs = [(out.dtype, out.shape), (None, None), (None, None), (total.dtype, total.shape)]
        normed, *unused, summed = edit.add_many(
            "SkipSimplifiedLayerNormalization",
            scope(node),
            [*add.inputs, node.inputs[1]],
            {"epsilon": node.attrs.get("epsilon", 1e-5)},
            outputs,
            domain="com.microsoft",
        )
        fused = normed.inputs[0]
        fused.outputs = [normed, *(gs.Variable.empty() for _ in unused), summed]
        edit.replace(out, normed)
        edit.replace(total, summed)
        node.outputs.clear()
        add.outputs.clear()
