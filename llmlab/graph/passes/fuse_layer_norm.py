"""LayerNorm from its primitives."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, other, producer
from llmlab.graph.passes.norms import fits, fuse, normalised, over_last_axis, squared, uncast
from llmlab.graph.rewrite import Match, Pass


class FuseLayerNorm(Pass):
    """(x - mean) / sqrt(mean((x - mean)²) + ε) · w + b over the last axis → one LayerNormalization (Ba et al., 2016)."""

    name = "fuse_layer_norm"

    def pattern(self, node: gs.Node) -> Match | None:
        d = squared(node)
        centred = producer(uncast(d), "Sub") if d is not None else None
        mean = producer(uncast(centred.inputs[1]), "ReduceMean") if centred is not None else None
        if centred is None or mean is None or uncast(mean.inputs[0]) is not uncast(centred.inputs[0]):
            return None
        return Match(node=node, x=centred.inputs[0], d=d, mean=mean)

    def check(self, edit: Editor, match: Match) -> str | None:
        if not over_last_axis(match.mean) or not over_last_axis(match.node):
            return "a mean is not over the last axis with keepdims"
        return normalised(edit, match, match.node, match.d)

    def rewrite(self, edit: Editor, match: Match) -> None:
        for result in match.results:
            out = result.out
            add = out.outputs[0] if len(out.outputs) == 1 and out.outputs[0].op == "Add" else None
            bias = other(add, out) if add is not None and not edit.is_output(out) else None
            if add is None or bias is None or not fits(bias, int(match.x.shape[-1])):
                fuse(edit, match, "LayerNormalization", match.x, result)
            else:
                fuse(edit, match, "LayerNormalization", match.x, result._replace(out=add.outputs[0]), bias)
