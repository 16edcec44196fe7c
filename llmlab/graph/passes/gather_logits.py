"""Only the rows whose next token is wanted go through the end of the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.rows import mixes_tokens, token_axis
from llmlab.graph.edit import Editor, producer, scope
from llmlab.graph.rewrite import Match, Pass

WANTED = "N"


class GatherLogits(Pass):
    """A Gather by `logits_index` rises from the logits through all row-wise nodes, up to the last attention."""

    name = "gather_logits"

    def find(self, edit: Editor) -> Iterator[Match]:
        if any(t.name == "logits_index" for t in edit.surgeon.inputs):
            return
        for out in edit.surgeon.outputs:
            if out.name == "logits" and out.inputs:
                yield Match(node=out.inputs[0], logits=out)

    def check(self, edit: Editor, match: Match) -> str | None:
        return (
            None
            if token_axis(match.logits) == 0
            else f"the logits have shape {match.logits.shape}, expected [T, vocab]"
        )

    def rewrite(self, edit: Editor, match: Match) -> None:
        index = gs.Variable("logits_index", np.dtype(np.int64), [WANTED])
        edit.surgeon.inputs.insert(5, index)
        region = _rising_region(match.logits)
        gathered: dict[int, gs.Variable] = {}

        def rows(tensor: gs.Tensor) -> gs.Variable:
            """The wanted rows of a tensor that the Gather does not rise above."""
            if id(tensor) not in gathered:
                maker = producer(tensor)
                where = scope(maker) if maker is not None else "logits"
                shape = [WANTED, *list(tensor.shape or ())[1:]]
                gathered[id(tensor)] = edit.add(
                    "Gather", where, [tensor, index], {"axis": 0}, dtype=tensor.dtype, shape=shape
                )
            return gathered[id(tensor)]

        inside = {id(n) for n in region}
        for node in region:
            node.inputs = [rows(t) if token_axis(t) == 0 and id(producer(t)) not in inside else t for t in node.inputs]
        for node in region:
            for out in node.outputs:
                out.shape = [WANTED, *list(out.shape or ())[1:]]
        if not region:  # the node that makes the logits needs all rows
            edit.replace(match.logits, rows(match.logits))


def _rising_region(logits: gs.Tensor) -> list[gs.Node]:
    """Nodes between the last attention and the logits that may see the wanted rows alone.

    A node joins when it keeps rows apart, has them on axis 0 throughout, and everything that reads it has joined.
    """
    region: dict[int, gs.Node] = {}
    pending = list(logits.inputs)
    while pending:
        node = pending.pop(0)
        if id(node) in region or node.op in ("PagedAttention", "Reshape") or mixes_tokens(node) is not None:
            continue
        if any(token_axis(t) != 0 for t in node.outputs) or any(token_axis(t) not in (None, 0) for t in node.inputs):
            continue
        readers = [c for out in node.outputs for c in out.outputs]
        if all(id(c) in region for c in readers):
            region[id(node)] = node
            pending.extend(p for t in node.inputs if (p := producer(t)) is not None)
    return list(region.values())
