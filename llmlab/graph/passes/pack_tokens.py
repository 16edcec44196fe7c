"""From padded [batch, sequence] to packed tokens [T]: the whole step is one row of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Dim, Editor
from llmlab.graph.graph import TOKENS
from llmlab.graph.rewrite import Match, Pass

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)


class PackTokens(Pass):
    """Inputs become the serving graph's: T tokens of any mix of sequences, laid end to end, as a batch of one."""

    name = "pack_tokens"

    def find(self, edit: Editor) -> Iterator[Match]:
        if edit.surgeon.nodes:
            yield Match(node=edit.surgeon.nodes[0])

    def check(self, edit: Editor, match: Match) -> str | None:
        names = [t.name for t in edit.surgeon.inputs]
        if sorted(names) != ["input_ids", "position_ids"]:
            return f"the graph's inputs are {', '.join(names)}; expected input_ids and position_ids"
        shapes = {tuple(t.shape or ()) for t in edit.surgeon.inputs}
        if (
            len(shapes) != 1
            or len(match_shape := next(iter(shapes))) != 2
            or not all(isinstance(d, str) for d in match_shape)
        ):
            return f"the inputs have shapes {sorted(shapes, key=str)}; expected two symbols, batch and sequence"
        if len(edit.surgeon.outputs) != 1:
            return f"the graph has {len(edit.surgeon.outputs)} outputs; expected the logits alone"
        match.batch, match.sequence = match_shape
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        surgeon = edit.surgeon
        for tensor in surgeon.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor.shape is not None:
                tensor.shape = [_packed(d, match.batch, match.sequence) for d in tensor.shape]
        axis = edit.constant("batch_axis", np.array([0], np.int64))
        inputs = []
        for old in surgeon.inputs:
            name, old.name = old.name, edit.name(f"{old.name}.row")
            packed = gs.Variable(name, _INT64, [TOKENS])
            surgeon.nodes.append(
                gs.Node("Unsqueeze", edit.name(f"{name}/Unsqueeze"), inputs=[packed, axis], outputs=[old])
            )
            inputs.append(packed)
        inputs.append(gs.Variable("query_start", _INT32, ["B+1"]))
        inputs.append(gs.Variable("kv_len", _INT32, ["B"]))
        inputs.append(gs.Variable("block_table", _INT32, ["B", "max_blocks"]))
        surgeon.inputs = inputs
        logits = surgeon.outputs[0]
        flat = edit.add(
            "Squeeze", "logits", [logits, axis], dtype=logits.dtype, shape=(logits.shape or [1, None, None])[1:]
        )
        edit.replace(logits, flat)


def _packed(dim: Dim, batch: str, sequence: str) -> Dim:
    """A size after packing: batch is 1, sequence is T, also as factors of products such as `2*batch*sequence`."""
    if not isinstance(dim, str):
        return dim
    factors = [TOKENS if f == sequence else f for f in dim.split("*") if f != batch]
    return "*".join(factors) or 1
