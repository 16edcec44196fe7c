"""The arithmetic of the causal mask gives way to `is_causal`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.masks import MaskKind, classify
from llmlab.graph.edit import Editor, operand, scope
from llmlab.graph.rewrite import Match, Pass


class RecogniseMask(Pass):
    """A mask that turns out causal when it is evaluated → Attention's `is_causal`; a window and ALiBi's slopes beside it."""

    name = "recognise_mask"

    def __init__(self) -> None:
        self._kinds: dict[str, MaskKind] = {}

    def pattern(self, node: gs.Node) -> Match | None:
        mask = operand(node, 3) if node.op == "Attention" else None
        return None if mask is None else Match(node=node, mask=mask)

    def check(self, edit: Editor, match: Match) -> str | None:
        if match.node.attrs.get("is_causal"):
            return "both a mask and is_causal are given"
        name = match.mask.name
        if name not in self._kinds:
            self._kinds[name] = classify(match.mask, edit.graph.config.max_position_embeddings)
        match.kind = self._kinds[name]
        if match.kind.reason is None and match.kind.slopes:
            shape = match.node.inputs[0].shape
            heads = shape[1] if shape is not None and len(shape) == 4 else None
            if not isinstance(heads, int) or len(match.kind.slopes) not in (1, heads):
                return f"its mask has {len(match.kind.slopes)} heads, and q has shape {shape}"
            match.slopes = np.resize(np.array(match.kind.slopes, np.float32), heads)
        return match.kind.reason

    def rewrite(self, edit: Editor, match: Match) -> None:
        node = match.node
        node.inputs[3] = gs.Variable.empty()
        while node.inputs[-1].is_empty():
            node.inputs.pop()
        node.attrs["is_causal"] = 1
        if match.kind.window:
            node.attrs[WINDOW] = match.kind.window
        if match.kind.slopes:
            node.inputs += [gs.Variable.empty() for _ in range(ALIBI_SLOPES - len(node.inputs))]
            node.inputs.append(edit.constant(f"{scope(node)}.alibi_slopes", match.slopes))


WINDOW = "llmlab_window"
"""Attribute that keeps a window between this pass and the next; the standard operator has none."""
ALIBI_SLOPES = 8
"""Input of Attention that keeps ALiBi's slopes [heads] between this pass and the next; the standard operator has none."""
