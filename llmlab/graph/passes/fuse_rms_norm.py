"""RMSNorm from its primitives."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, ints, operand, other, producer, scalar, scope
from llmlab.graph.rewrite import Match, Pass


class FuseRMSNorm(Pass):
    """x · rsqrt(mean(x²) + ε) · w over the last axis → one RMSNormalization (Zhang & Sennrich, 2019)."""

    name = "fuse_rms_norm"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "ReduceMean":
            return None
        square = producer(node.inputs[0], "Pow", "Mul")
        if square is None or not _is_square(square):
            return None
        return Match(node=node, x=square.inputs[0])

    def check(self, edit: Editor, match: Match) -> str | None:
        mean = match.node
        if ints(operand(mean, 1)) not in ([-1], [_rank(match.x) - 1]) or mean.attrs.get("keepdims", 1) != 1:
            return "the mean is not over the last axis with keepdims"
        add = _only(mean.outputs[0], "Add")
        epsilon = scalar(other(add, mean.outputs[0])) if add is not None else None
        if add is None or epsilon is None:
            return "no constant ε is added to the mean"
        root = _only(add.outputs[0], "Sqrt")
        inverse = _only(root.outputs[0], "Reciprocal") if root is not None else None
        scaled = _only(inverse.outputs[0], "Mul") if inverse is not None else None
        if inverse is None or scaled is None or other(scaled, inverse.outputs[0]) is not match.x:
            return "mean + ε is not used as x · reciprocal(sqrt(·))"
        weighted = _only(scaled.outputs[0], "Mul")
        weight = other(weighted, scaled.outputs[0]) if weighted is not None else None
        width = _last(match.x)
        if weighted is None or weight is None or not constant_expression(weight) or list(weight.shape or ()) != [width]:
            return f"no constant weight of shape [{width}] multiplies the result"
        match.epsilon, match.weight, match.result = epsilon, weight, weighted.outputs[0]
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        fused = edit.add(
            "RMSNormalization",
            scope(match.node),
            [match.x, match.weight],
            {"axis": -1, "epsilon": match.epsilon},
            dtype=match.result.dtype or np.dtype(np.float32),
            shape=match.x.shape,
        )
        edit.replace(match.result, fused)


def _is_square(node: gs.Node) -> bool:
    return scalar(node.inputs[1]) == 2.0 if node.op == "Pow" else node.inputs[0] is node.inputs[1]


def _only(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The one consumer of `tensor`, if it is an `op`."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 and tensor.outputs[0].op == op else None


def _rank(tensor: gs.Tensor) -> int:
    return len(tensor.shape or ())


def _last(tensor: gs.Tensor) -> object:
    return tensor.shape[-1] if tensor.shape else None
