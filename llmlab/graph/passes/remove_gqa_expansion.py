"""Keys and values are not repeated for every query head: Attention groups heads itself."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, producer
from llmlab.graph.rewrite import Match, Pass


class RemoveGQAExpansion(Pass):
    """Unsqueeze → Expand → Reshape in front of Attention's keys or values goes (grouped-query attention)."""

    name = "remove_gqa_expansion"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "Attention":
            return None
        expanded = {
            i: reshape
            for i in (1, 2)
            if (reshape := producer(node.inputs[i], "Reshape")) and producer(reshape.inputs[0], "Expand")
        }
        return Match(node=node, expanded=expanded) if expanded else None

    def check(self, edit: Editor, match: Match) -> str | None:
        match.sources = {}
        for i, reshape in match.expanded.items():
            expand = producer(reshape.inputs[0], "Expand")
            unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
            if expand is None or unsqueeze is None:
                return "what is expanded is not an Unsqueeze"
            source, wide, out = unsqueeze.inputs[0], expand.outputs[0].shape, reshape.outputs[0].shape
            if source.shape is None or wide is None or out is None or len(source.shape) != 4 or len(wide) != 5:
                return "the shapes around the expansion are not known"
            batch, heads, length, dim = source.shape
            if list(unsqueeze.outputs[0].shape or ()) != [batch, heads, 1, length, dim]:
                return "the new axis is not the one behind the KV heads"
            if not isinstance(heads, int) or wide[1] != heads or not isinstance(wide[2], int) or wide[4] != dim:
                return f"{source.shape} is expanded to {wide}, not along the group axis alone"
            if out[1] != heads * wide[2] or out[3] != dim:
                return f"{wide} is reshaped to {out}, which mixes heads"
            match.sources[i] = source
        if len({s.shape[1] for s in match.sources.values()}) != 1 or len(match.sources) != 2:
            return "keys and values are not expanded alike"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        for i, source in match.sources.items():
            match.node.inputs[i] = source
