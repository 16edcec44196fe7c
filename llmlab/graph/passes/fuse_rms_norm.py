"""RMSNorm from its primitives."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor
from llmlab.graph.passes.norms import fuse, normalised, over_last_axis, squared
from llmlab.graph.rewrite import Match, Pass


class FuseRMSNorm(Pass):
    """x / sqrt(mean(x²) + ε) · w over the last axis → one RMSNormalization (Zhang & Sennrich, 2019)."""

    name = "fuse_rms_norm"

    def pattern(self, node: gs.Node) -> Match | None:
        x = squared(node)
        return None if x is None else Match(node=node, x=x)

    def check(self, edit: Editor, match: Match) -> str | None:
        if not over_last_axis(match.node):
            return "the mean is not over the last axis with keepdims"
        return normalised(edit, match, match.node, match.x)

    def rewrite(self, edit: Editor, match: Match) -> None:
        for result in match.results:
            fuse(edit, match, "RMSNormalization", match.x, result)
