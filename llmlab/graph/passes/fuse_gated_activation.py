"""SwiGLU, GeGLU and their kin."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.analysis.activations import activation_of
from llmlab.graph.edit import Editor, producer, scope
from llmlab.graph.graph import LLMLAB_DOMAIN
from llmlab.graph.rewrite import Match, Pass


class FuseGatedActivation(Pass):
    """activation(gate) · up, the halves of one product → GatedActivation, one kernel where a target has it (Shazeer, 2020)."""

    name = "fuse_gated_activation"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "Mul":
            return None
        for gated, up in (node.inputs, node.inputs[::-1]):
            split = producer(up, "Split")
            if split is None or len(split.outputs) != 2 or producer(gated, "Split") is not None:
                continue
            gate = split.outputs[0] if split.outputs[1] is up else split.outputs[1]
            if (known := activation_of(gated, gate)) is not None:
                return Match(node=node, split=split, known=known, gate=gate)
        return None

    def check(self, edit: Editor, match: Match) -> str | None:
        split = match.split
        shapes = [list(t.shape or ()) for t in split.outputs]
        if shapes[0] != shapes[1] or not shapes[0]:
            return f"the two parts have shapes {shapes[0]} and {shapes[1]}"
        if split.attrs.get("axis", 0) not in (-1, len(shapes[0]) - 1):
            return "the product is not split along its last axis"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        out = match.node.outputs[0]
        attrs = {
            "activation": match.known.kind,
            "alpha": match.known.alpha,
            "gate_first": int(match.gate is match.split.outputs[0]),
        }
        fused = edit.add(
            "GatedActivation",
            scope(match.node),
            [match.split.inputs[0]],
            attrs,
            dtype=out.dtype,
            shape=match.gate.shape,
            domain=LLMLAB_DOMAIN,
        )
        edit.replace(out, fused)
