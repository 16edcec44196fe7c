"""Activations from their primitives."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.activations import activation_of, argument, curve
from llmlab.graph.edit import Editor, other, producer, scalar, scope
from llmlab.graph.rewrite import Match, Pass


class FuseActivation(Pass):
    """x · f(x) that turns out to be GELU or SiLU when it is computed → Gelu, exact or by tanh, or x · Sigmoid(α · x)."""

    name = "fuse_activation"

    def pattern(self, node: gs.Node) -> Match | None:
        x = argument(node)
        if x is None or not curve(node.outputs[0], x) or _canonical(node, x):
            return None
        known = activation_of(node.outputs[0], x)
        readers = node.outputs[0].outputs
        if known is None and len(readers) == 1 and argument(readers[0]) is x:
            return None  # a factor is still to come
        return Match(node=node, x=x, known=known)

    def check(self, edit: Editor, match: Match) -> str | None:
        if match.known is None or match.known.kind not in ("gelu", "gelu_tanh", "silu"):
            return f"as a function of {match.x.name} it is no activation known here"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        x, out, where = match.x, match.node.outputs[0], scope(match.node)
        if match.known.kind != "silu":
            attrs = {"approximate": "tanh" if match.known.kind == "gelu_tanh" else "none"}
            result = edit.add("Gelu", where, [x], attrs, dtype=out.dtype, shape=x.shape)
        else:
            scaled = x
            if match.known.alpha != 1:
                alpha = edit.constant(f"{where}/alpha", np.asarray(match.known.alpha, x.dtype))
                scaled = edit.add("Mul", where, [x, alpha], dtype=x.dtype, shape=x.shape)
            share = edit.add("Sigmoid", where, [scaled], dtype=x.dtype, shape=x.shape)
            result = edit.add("Mul", where, [x, share], dtype=out.dtype, shape=x.shape)
        edit.replace(out, result)


def _canonical(node: gs.Node, x: gs.Tensor) -> bool:
    """Whether `node` is x · Sigmoid(x) or x · Sigmoid(α · x) already."""
    if node.op != "Mul" or not any(t is x for t in node.inputs):
        return False
    share = producer(other(node, x), "Sigmoid")
    inside = share.inputs[0] if share is not None else None
    if inside is None or inside is x:
        return inside is x
    scaled = producer(inside, "Mul")
    return scaled is not None and any(t is x for t in scaled.inputs) and scalar(other(scaled, x)) is not None
