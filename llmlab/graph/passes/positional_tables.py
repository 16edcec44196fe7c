"""What a model computes from a token's place in its sequence becomes a table over positions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.evaluate import CannotEvaluate, PositionFunction
from llmlab.graph.analysis.positions import depends_on_positions
from llmlab.graph.analysis.rows import mixes_tokens, token_axis, token_counts
from llmlab.graph.edit import Dim, Editor, ancestors, producer, scope
from llmlab.graph.rewrite import Match, Pass

_LENGTHS = (1, 2, 7, 33, 130)
_LARGEST = 1 << 28  # bytes of a table
_WEIGHT = 1 << 17  # bytes; a float matrix, or anything this large, is not copied into a table


class PositionalTables(Pass):
    """arange, cumsum of ones and the like, where they meet tokens → rows of a table, by `position_ids`.

    In the plain graph row i of a sequence is position i. A tensor that gives row i the same at every length tried is a
    function of the position, however it was computed: packed tokens look it up. Where positions index a learned
    embedding, the index is replaced and the embedding stays where it is.
    """

    name = "positional_tables"

    def find(self, edit: Editor) -> Iterator[Match]:
        kinds = depends_on_positions(edit.surgeon)
        sizes = token_counts(edit.surgeon)
        seen: set[int] = set()
        for node in list(edit.surgeon.nodes):
            if node.op in ("Shape", "Size") or all(kinds.get(id(t), True) for t in node.outputs):
                continue
            for tensor in [t for t in node.inputs if kinds.get(id(t))]:
                for part in _parts(tensor, kinds, sizes):
                    if id(part) not in seen and token_axis(part) is not None:
                        seen.add(id(part))
                        yield Match(node=part.inputs[0], tensor=part)

    def check(self, edit: Editor, match: Match) -> str | None:
        tensor: gs.Tensor = match.tensor
        if (weight := _weight_of(tensor)) is not None:
            return f"a table of it would be a copy of {weight}"
        axis, shape = token_axis(tensor), list(tensor.shape or ())
        if axis is None or any(not isinstance(d, int) for i, d in enumerate(shape) if i != axis):
            return f"its shape is {shape}; expected one axis of tokens, and all others known"
        function = PositionFunction([tensor])
        if (reason := function.dependence()) is not None:
            return reason
        length = edit.graph.config.max_position_embeddings
        try:
            (full,) = function(np.arange(length))
            parts = [(n, function(np.arange(n))[0]) for n in _LENGTHS if n < length]
        except CannotEvaluate as problem:
            return f"it can't be evaluated ({problem})"
        if [n for i, n in enumerate(full.shape) if i != axis] != [d for i, d in enumerate(shape) if i != axis]:
            return f"its shape is {list(full.shape)} for {length} tokens, not {shape}"
        if full.nbytes > _LARGEST:
            return f"a table of it would take {full.nbytes / 1e6:.0f} MB"
        rows = np.moveaxis(full, axis, 0)
        if any(not np.array_equal(np.moveaxis(part, axis, 0), rows[:n]) for n, part in parts):
            return "it depends on the sequence's length, not on a token's own position alone"
        match.axis, match.rows = axis, rows
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        tensor, axis, rows, where = match.tensor, match.axis, match.rows, scope(match.node)
        shape: list[Dim] = list(tensor.shape or ())
        ones = [i for i in range(axis) if shape[i] == 1]
        rows = np.squeeze(rows, tuple(i + 1 for i in ones))
        positions = next(t for t in edit.surgeon.inputs if t.name == "position_ids")
        tokens, rest = shape[axis], list(rows.shape[1:])
        if rows.dtype == np.int64 and rows.ndim == 1 and np.array_equal(rows, np.arange(len(rows))):
            found: gs.Tensor = positions
        else:
            table = edit.constant(f"{where}/by_position", np.ascontiguousarray(rows))
            found = edit.add(
                "Gather", where, [table, positions], {"axis": 0}, dtype=tensor.dtype, shape=[tokens, *rest]
            )
        if (before := axis - len(ones)) > 0:
            perm = [*range(1, before + 1), 0, *range(before + 1, len(rest) + 1)]
            moved = [*rest[:before], tokens, *rest[before:]]
            found = edit.add("Transpose", where, [found], {"perm": perm}, dtype=tensor.dtype, shape=moved)
        inner = [i for i in ones if i]
        if inner:
            at = edit.constant(f"{where}/axes", np.array([i - (0 in ones) for i in inner], np.int64))
            found = edit.add(
                "Unsqueeze", where, [found, at], dtype=tensor.dtype, shape=shape[1:] if 0 in ones else shape
            )
        if 0 in ones:
            batch = edit.constant("batch_axis", np.array([0], np.int64))
            found = edit.add("Unsqueeze", where, [found, batch], dtype=tensor.dtype, shape=shape)
        edit.replace(tensor, found)


def _parts(tensor: gs.Tensor, kinds: dict[int, bool], sizes: set[int]) -> list[gs.Tensor]:
    """The tensors to look up so that `tensor` becomes right for packed tokens: itself, or what a weight is indexed by."""
    nodes, _ = ancestors(tensor)
    if id(tensor) not in sizes and all(mixes_tokens(n, sizes) is None for n in nodes):
        return []
    node = producer(tensor)
    if node is None or _weight_of(tensor) is None or mixes_tokens(node, sizes) is not None:
        return [tensor]
    return [part for t in node.inputs if kinds.get(id(t)) for part in _parts(t, kinds, sizes)]


def _weight_of(tensor: gs.Tensor) -> str | None:
    """A weight that `tensor` is computed from, if there is one."""
    nodes, _ = ancestors(tensor)
    for node in nodes:
        for constant in node.inputs:
            if isinstance(constant, gs.Constant):
                values = constant._values
                if values.nbytes >= _WEIGHT or (
                    len(values.shape) > 1 and values.dtype.kind == "f" and values.size > 64
                ):
                    return str(constant.name)
    return None
