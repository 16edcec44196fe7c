"""The arithmetic of the causal mask gives way to `is_causal`."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand
from llmlab.graph.masks import MaskKind, classify
from llmlab.graph.rewrite import Match, Pass


class RecogniseMask(Pass):
    """A mask that turns out causal when it is evaluated → Attention's `is_causal`; a window → `llmlab_window`."""

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
        return match.kind.reason

    def rewrite(self, edit: Editor, match: Match) -> None:
        match.node.inputs = list(match.node.inputs)[:3]
        match.node.attrs["is_causal"] = 1
        if match.kind.window:
            match.node.attrs[WINDOW] = match.kind.window


WINDOW = "llmlab_window"
"""Attribute that keeps a window between this pass and the next; the standard operator has none."""
