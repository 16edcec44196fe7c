"""A norm without weights, as torch's exporter writes it: weighed by ones, as many as its input has numbers."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, is_bfloat16, operand, producer, value
from llmlab.graph.rewrite import Match, Pass

_WIDEST = 1 << 20  # more is no model's width, but a file may say so


class VectorScale(Pass):
    """A norm's scale that is one number throughout, of a computed shape → a constant vector of the norm's width."""

    name = "vector_scale"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op not in ("RMSNormalization", "LayerNormalization") or node.domain:
            return None
        scale = operand(node, 1)
        filled = producer(scale, "ConstantOfShape") if scale is not None else None
        return None if filled is None else Match(node=node, filled=filled)

    def check(self, edit: Editor, match: Match) -> str | None:
        shape, axis = match.node.inputs[0].shape, match.node.attrs.get("axis", -1)
        if not shape or not isinstance(shape[-1], int):
            return "the width of its input isn't known"
        if shape[-1] > _WIDEST:
            return f"its input is {shape[-1]} wide"
        if axis not in (-1, len(shape) - 1):
            return f"it normalises from axis {axis} on, not over the last one alone"
        if is_bfloat16(match.filled.outputs[0]):
            return "its scale is in bfloat16"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        node = match.node
        number = value(match.filled.attrs.get("value"))
        number = np.zeros(1, np.float32) if number is None else number  # ONNX's default
        node.inputs[1] = edit.constant(f"{node.name}/scale", np.repeat(number.reshape(1), node.inputs[0].shape[-1]))
