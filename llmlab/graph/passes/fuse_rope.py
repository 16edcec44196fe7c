"""Rotary position embedding from its primitives, whatever frequencies it uses."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, ints, operand, other, producer, scope
from llmlab.graph.evaluate import CannotEvaluate, PositionFunction
from llmlab.graph.rewrite import Match, Pass


class FuseRoPE(Pass):
    """x · cos + rotate_half(x) · sin → RotaryEmbedding with tables (Su et al., 2021).

    cos and sin are recognised by evaluating them: any function of the position alone becomes a table, so scaled
    frequencies (llama3, linear, yarn) need no case of their own.
    """

    name = "fuse_rope"

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str], tuple[gs.Constant, gs.Constant] | str] = {}

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "Add":
            return None
        plain, turned = (producer(t, "Mul") for t in node.inputs)
        if plain is None or turned is None:
            return None
        for a, b in ((plain, turned), (turned, plain)):
            for rotated in b.inputs:
                if (x := _rotate_half(rotated)) is not None and any(t is x for t in a.inputs):
                    return Match(node=node, x=x, cos=other(a, x), sin=other(b, rotated))
        return None

    def check(self, edit: Editor, match: Match) -> str | None:
        shape = match.x.shape
        if shape is None or len(shape) != 4 or not isinstance(shape[-1], int):
            return f"x has shape {shape}, expected [batch, heads, sequence, head_dim]"
        key = (match.cos.name, match.sin.name)
        if key not in self._tables:
            self._tables[key] = self._tabulate(edit, match, shape[-1])
        tables = self._tables[key]
        if isinstance(tables, str):
            return tables
        match.cos_cache, match.sin_cache = tables
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        positions = next(t for t in edit.surgeon.inputs if t.name == "position_ids")
        fused = edit.add(
            "RotaryEmbedding",
            scope(match.node),
            [match.x, match.cos_cache, match.sin_cache, positions],
            {"interleaved": 0},
            dtype=match.x.dtype or np.dtype(np.float32),
            shape=match.x.shape,
        )
        edit.replace(match.node.outputs[0], fused)

    def _tabulate(self, edit: Editor, match: Match, width: int) -> tuple[gs.Constant, gs.Constant] | str:
        """cos and sin tables [max_position, width/2], or the reason why there are none."""
        function = PositionFunction([match.cos, match.sin])
        if (reason := function.dependence()) is not None:
            return f"cos or sin {reason}"
        length = edit.graph.config.max_position_embeddings
        every, probe = np.arange(length)[None], np.random.default_rng(0).integers(0, length, (2, 5))
        try:
            (cos, sin), probed = function(every), function(probe)
        except CannotEvaluate as problem:
            return f"cos or sin can't be evaluated ({problem})"
        if cos.shape != (1, 1, length, width) or sin.shape != cos.shape:
            return f"cos has shape {list(cos.shape)} for {length} positions, expected [1, 1, {length}, {width}]"
        half = width // 2
        if not (np.array_equal(cos[..., :half], cos[..., half:]) and np.array_equal(sin[..., :half], sin[..., half:])):
            return "the two halves of cos or sin differ"
        for table, seen in zip((cos, sin), probed, strict=True):
            if not np.array_equal(seen[:, 0], table[0, 0][probe]):
                return "cos or sin depend on more than a token's own position, such as the sequence's length"
        return (
            edit.constant("rope.cos", np.ascontiguousarray(cos[0, 0, :, :half])),
            edit.constant("rope.sin", np.ascontiguousarray(sin[0, 0, :, :half])),
        )


def _rotate_half(tensor: gs.Tensor) -> gs.Tensor | None:
    """x where `tensor` is concat(-x[half:], x[:half]) over the last axis, else None."""
    concat = producer(tensor, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    negated = producer(concat.inputs[0], "Neg")
    second = producer(negated.inputs[0], "Slice") if negated is not None else None
    first = producer(concat.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x = first.inputs[0]
    if not x.shape or not isinstance(x.shape[-1], int) or x.shape[-1] % 2:
        return None
    rank, half = len(x.shape), x.shape[-1] // 2
    if concat.attrs.get("axis") not in (-1, rank - 1):
        return None
    if (
        _range(first, rank) != (0, half)
        or (lo_hi := _range(second, rank)) is None
        or lo_hi[0] != half
        or lo_hi[1] < 2 * half
    ):
        return None
    return x


def _range(node: gs.Node, rank: int) -> tuple[int, int] | None:
    """(start, end) of a Slice over the last axis with step 1, else None."""
    parts = [ints(operand(node, i)) for i in (1, 2, 3)]
    if any(p is None or len(p) != 1 for p in parts) or ints(operand(node, 4)) not in (None, [1]):
        return None
    start, end, axis = (p[0] for p in parts if p is not None)
    return (start, end) if axis in (-1, rank - 1) else None
