"""Quantized weights for ONNX Runtime's CPU: DequantizeLinear, one for each product."""

from __future__ import annotations

from llmlab.graph.edit import Editor, scope
from llmlab.graph.quantized import joined


def join_quantized(edit: Editor) -> None:
    """A Concat of weights that are quantized alike → the DequantizeLinear of one, whose arrays are joined when they are written: else
    each step would join what it has dequantized."""
    for node in [n for n in edit.surgeon.nodes if n.op == "Concat"]:
        if (weight := joined(node.outputs[0])) is not None:
            edit.replace(node.outputs[0], weight.add(edit, scope(node)))
            node.outputs.clear()
