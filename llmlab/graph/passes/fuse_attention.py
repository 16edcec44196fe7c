"""Attention from its primitives: whatever is done between q · kᵀ and the softmax, as long as positions alone decide it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Dim, Editor, constant_expression, ints, operand, producer, scalar, scope, value
from llmlab.graph.passes.attention_scores import constant_factor, per_head, trace_back
from llmlab.graph.rewrite import Match, Pass

SINKS = 7
"""Input of Attention that keeps a logit per head [heads] between this pass and the next; the standard operator has none."""


class FuseAttention(Pass):
    """softmax(q · kᵀ · scale, softcap, mask, sinks) · v → Attention, the mask's arithmetic as its mask.

    Scale may stand on q, k or the scores; heads may be an axis or merged with the batch. What is done to the scores is
    replayed on zeros, which gives an additive mask (ALiBi included) however it is written.
    """

    name = "fuse_attention"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "Softmax":
            return None
        tensor, cut = _without_nan(node.outputs[0]), None
        while len(tensor.outputs) == 1:
            reader = tensor.outputs[0]
            if reader.op == "MatMul" and reader.inputs[0] is tensor and not constant_expression(reader.inputs[1]):
                return Match(node=node, product=reader, cut=cut)
            if reader.op == "Slice" and cut is None:
                cut = reader
            elif reader.op not in ("Cast", "Reshape"):
                return None
            tensor = reader.outputs[0]
        return None

    def check(self, edit: Editor, match: Match) -> str | None:
        node, product = match.node, match.product
        rank = len(node.inputs[0].shape or ())
        if node.attrs.get("axis", -1) not in (-1, rank - 1):
            return "its softmax is not over the last axis"
        scores = trace_back(node.inputs[0])
        if isinstance(scores, str):
            return scores
        q, k, v = (
            _by_heads(t, transposed=i == 1, scaled=i < 2)
            for i, t in enumerate([*scores.product.inputs, product.inputs[1]])
        )
        shapes = [x.shape for x in (q, k, v)]
        shape = shapes[0] or []
        if any(s is None or len(s) != 4 for s in shapes) or not isinstance(heads := shape[1], int):
            return f"q, k, v have shapes {shapes}; expected [batch, heads, sequence, head_dim]"
        out = _output(product, shape)
        if out is None:
            return f"its result has shape {product.outputs[0].shape}, from which no reshape leads back to heads"
        merged = {t.shape[0] for t in (scores.product.inputs[0], product.inputs[1]) if len(t.shape) == 3}
        for reshape in [n for n in (*scores.steps, *_between(node, product)) if n.op == "Reshape"]:
            if not _keeps_heads(reshape.outputs[0].shape, shape, merged):
                return f"{reshape.name} gives the scores an unknown layout"
        if (reason := scores.read(q.factor * k.factor)) is not None:
            return reason
        if (match.cut is None) != (scores.sink is None):
            return "a column is cut off its scores that was no sink, or the other way round"
        if match.cut is not None and not _cuts_last(match.cut, len(match.cut.inputs[0].shape or ())):
            return "more is cut off its scores than the sink"
        match.sinks = None if scores.sink is None else per_head(scores.sink, heads)
        if scores.sink is not None and match.sinks is None:
            return "what is joined to its scores is not one constant a head"
        match.scores, match.out, match.parts = scores, out, (q, k, v)
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        where, scores, (q, k, v) = scope(match.node), match.scores, match.parts
        inputs: list[gs.Tensor | None] = [x.build(edit, where) for x in (q, k, v)]
        batch, heads, length, _ = q.shape
        inputs.append(scores.mask(edit, where, heads))
        if match.sinks is not None:
            sinks = match.sinks
            if (array := value(sinks)) is not None:
                sinks = edit.constant(f"{where}.sinks", array.reshape(-1))
            inputs += [None] * (SINKS - len(inputs)) + [sinks]
        attrs = {"scale": scores.scale} | ({"softcap": scores.softcap} if scores.softcap else {})
        shape = [batch, heads, length, v.shape[-1]]
        fused = edit.add("Attention", where, inputs, attrs, dtype=match.out.dtype, shape=shape)
        edit.replace(match.out, fused)


@dataclass
class _ByHeads:
    """q, k or v as [batch, heads, sequence, head_dim]: `source`, with its axes in the order `perm`, times `factor`."""

    source: gs.Tensor
    perm: list[int] | None = None
    factor: float = 1.0

    @property
    def shape(self) -> list[Dim] | None:
        shape = self.source.shape
        return [shape[i] for i in self.perm] if self.perm and shape is not None else shape

    def build(self, edit: Editor, where: str) -> gs.Tensor:
        if self.perm is None:
            return self.source
        dtype = self.source.dtype
        return edit.add("Transpose", where, [self.source], {"perm": self.perm}, dtype=dtype, shape=self.shape)


def _by_heads(tensor: gs.Tensor, *, transposed: bool, scaled: bool) -> _ByHeads:
    """Look through scales, transposes, and the merging of batch and heads. transposed: k comes as [.., head_dim, sequence].

    Where they can't be told apart the result has the rank of what was found.
    """
    factor = 1.0
    split: gs.Tensor | None = None
    while (node := producer(tensor)) is not None:
        rank = len(tensor.shape or ())
        perm = list(node.attrs.get("perm", ())) if node.op == "Transpose" else []
        if scaled and node.op in ("Mul", "Div") and (by := constant_factor(node)) is not None:
            factor *= by[1]
            tensor = by[0]
        elif rank == 3 and perm == [0, 2, 1]:
            transposed, tensor = not transposed, node.inputs[0]
        elif rank == 3 and node.op == "Reshape" and _merges_heads(node):
            if split is not None and list(split.shape[:2]) != list(node.inputs[0].shape[:2]):
                break
            split, tensor = None, node.inputs[0]
        elif rank == 4 and node.op == "Reshape" and _splits_heads(node):
            split, tensor = tensor, node.inputs[0]
        elif rank == 4 and transposed and perm:
            perm[2:] = perm[3], perm[2]
            if perm != [0, 1, 2, 3]:
                return _ByHeads(node.inputs[0], perm, factor)
            transposed, tensor = False, node.inputs[0]
        else:
            break
    turn = [0, 1, 3, 2] if transposed and len(tensor.shape or ()) == 4 else None
    return _ByHeads(tensor, turn, factor)


def _merges_heads(reshape: gs.Node) -> bool:
    """[batch, heads, m, n] → [batch · heads, m, n]."""
    source, out = reshape.inputs[0].shape, reshape.outputs[0].shape
    known = source is not None and len(source) == 4 and isinstance(source[1], int)
    return known and None not in source and list(source[2:]) == list(out[1:])


def _splits_heads(reshape: gs.Node) -> bool:
    """[batch · heads, m, n] → [batch, heads, m, n]."""
    source, out = reshape.inputs[0].shape, reshape.outputs[0].shape
    return source is not None and len(source) == 3 and None not in source[1:] and list(source[1:]) == list(out[2:])


def _keeps_heads(shape: list[Dim] | None, q: list[Dim], merged: set[Dim]) -> bool:
    """Whether scores of this shape lie as [batch, heads, query, key], or with the first two merged."""
    leading = list(shape or ())[:-1]
    return leading == list(q[:3]) or (len(leading) == 2 and leading[0] in merged and leading[1] == q[2])


def _output(product: gs.Node, q: list[Dim]) -> gs.Tensor | None:
    """The result as [batch, heads, sequence, head_dim]."""
    out = product.outputs[0]
    if len(out.shape or ()) == 4:
        return out if list(out.shape[:3]) == list(q[:3]) else None
    reader = out.outputs[0] if len(out.outputs) == 1 else None
    if reader is None or reader.op != "Reshape" or list(reader.outputs[0].shape or ())[:3] != list(q[:3]):
        return None
    return reader.outputs[0] if len(reader.outputs[0].shape) == 4 else None


def _between(softmax: gs.Node, product: gs.Node) -> list[gs.Node]:
    """Nodes from the softmax to the product with v."""
    nodes, node = [], producer(product.inputs[0])
    while node is not None and node is not softmax:
        nodes.append(node)
        node = producer(node.inputs[2 if node.op == "Where" else 0])
    return nodes


def _without_nan(weights: gs.Tensor) -> gs.Tensor:
    """What is read instead of `weights` where a softmax's NaN become 0: those of a row that sees nothing.

    No row is one wherever Attention is paged: its mask has to be recognised, and every token sees itself there.
    """
    if {n.op for n in weights.outputs} == {"IsNaN", "Where"} and len(weights.outputs) == 2:
        test, choice = sorted(weights.outputs, key=lambda n: str(n.op))
        if choice.inputs[0] is test.outputs[0] and choice.inputs[2] is weights and scalar(choice.inputs[1]) == 0:
            return choice.outputs[0] if len(test.outputs[0].outputs) == 1 else weights
    return weights


def _cuts_last(node: gs.Node, rank: int) -> bool:
    """Whether a Slice takes all but the last column."""
    starts, ends, axes, steps = (ints(operand(node, i)) for i in (1, 2, 3, 4))
    return starts == [0] and ends == [-1] and axes in ([-1], [rank - 1]) and steps in (None, [1])
