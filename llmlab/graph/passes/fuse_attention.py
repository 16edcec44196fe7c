"""Attention from its primitives: whatever is done between q · kᵀ and the softmax, as long as positions alone decide it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.evaluate import PositionFunction
from llmlab.graph.edit import Dim, Editor, constant_expression, ints, operand, producer, scalar, scope, value
from llmlab.graph.rewrite import Match, Pass
from llmlab.graph.store.storage import onnx_dtype

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
        scores = _trace_back(node.inputs[0])
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
        match.sinks = None if scores.sink is None else _per_head(scores.sink, heads)
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
        if scaled and node.op in ("Mul", "Div") and (by := _constant_factor(node)) is not None:
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


def _constant_factor(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """(x, c) where a Mul or Div computes x · c."""
    a, b = node.inputs
    if (c := scalar(b)) is not None:
        if node.op == "Mul":
            return a, c
        return (a, 1 / c) if c else None
    return (b, c) if node.op == "Mul" and (c := scalar(a)) is not None else None


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


def _per_head(tensor: gs.Tensor, heads: int) -> gs.Tensor | None:
    """The constant of one number a head behind a [batch, heads, query, 1] tensor."""
    if len(tensor.shape or ()) != 4 or tensor.shape[1] != heads or tensor.shape[3] != 1:
        return None
    expand = producer(tensor, "Expand")
    tensor = expand.inputs[0] if expand is not None else tensor
    if list(tensor.shape or ()) != [1, heads, 1, 1] or not constant_expression(tensor):
        return None
    while (node := producer(tensor, "Reshape", "Unsqueeze")) is not None:  # their order can't change: they are a row
        tensor = node.inputs[0]
    return tensor if len(tensor.shape or ()) == 1 or value(tensor) is not None else None


@dataclass
class _Scores:
    """What lies between q · kᵀ and the softmax: `steps` in order, each with the input that carries the scores."""

    product: gs.Node
    steps: list[gs.Node]
    carried: list[int]
    sink: gs.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    masked_from: int = field(default=0)
    """The first step that adds or hides; from there on steps are the mask's arithmetic."""

    def read(self, factor: float) -> str | None:
        """Find scale and softcap, with `factor` on q and k; or the reason why they aren't there."""
        inner, capped = factor, False
        self.masked_from = len(self.steps)
        outer = 1.0
        for i, node in enumerate(self.steps):
            if node.op in ("Mul", "Div"):
                by = _constant_factor(node)
                if by is None:
                    return f"{node.name} scales the scores by what is no constant"
                inner, outer = (inner, outer * by[1]) if capped else (inner * by[1], outer)
            elif node.op == "Tanh":
                if capped or self.masked_from < i:
                    return f"{node.name} bends scores that are masked or bent already"
                capped = True
            elif node.op in ("Add", "Sub", "Where"):
                self.masked_from = min(self.masked_from, i)
        if capped and outer <= 0:
            return f"its softcap is {outer}"
        self.scale, self.softcap = (inner * outer, outer) if capped else (inner, 0.0)
        return None if math.isfinite(self.scale) and self.scale else f"its scale is {self.scale}"

    def mask(self, edit: Editor, where: str, heads: int) -> gs.Tensor | None:
        """The mask: the steps that add and hide, replayed on scores of zero."""
        steps = list(zip(self.steps, self.carried, strict=True))[self.masked_from :]
        if not steps:
            return None
        before, dtype = steps[0][0].inputs[steps[0][1]], self.product.outputs[0].dtype or np.dtype(np.float32)
        merged_at_last = len(self.steps[-1].outputs[0].shape or ()) == 3
        zeros: gs.Tensor
        if merged_at_last or any(node.op == "Reshape" for node, _ in steps):
            sizes = _sizes(edit, where, heads, merged=len(before.shape or ()) == 3)
            zero = gs.Constant("zero", np.zeros(1, dtype))
            zeros = edit.add("ConstantOfShape", where, [sizes], {"value": zero}, dtype=dtype, shape=before.shape)
        else:
            zeros = edit.constant(f"{where}/zero", np.zeros((), dtype))
        tensor = zeros
        for node, carried in steps:
            inputs = [tensor if i == carried else t for i, t in enumerate(node.inputs)]
            tensor = edit.add(node.op, where, inputs, node.attrs, dtype=node.outputs[0].dtype, shape=None)
        if merged_at_last:
            target = _sizes(edit, where, heads, merged=False)
            tensor = edit.add("Reshape", where, [tensor, target], dtype=tensor.dtype, shape=None)
        if tensor.dtype != dtype:
            tensor = edit.add("Cast", where, [tensor], {"to": onnx_dtype(dtype)}, dtype=dtype, shape=None)
        return tensor


def _sizes(edit: Editor, where: str, heads: int, *, merged: bool) -> gs.Tensor:
    """The shape of the scores, as a tensor: [batch, heads, sequence, sequence], or its first two merged."""
    ids = next(t for t in edit.surgeon.inputs if t.name == "input_ids")
    int64 = np.dtype(np.int64)
    batch, length = (
        edit.add("Shape", where, [ids], {"start": i, "end": i + 1}, dtype=int64, shape=[1]) for i in (0, 1)
    )
    count = edit.constant(f"{where}/heads", np.array([heads], np.int64))
    leading = [edit.add("Mul", where, [batch, count], dtype=int64, shape=[1])] if merged else [batch, count]
    return edit.add("Concat", where, [*leading, length, length], {"axis": 0}, dtype=int64, shape=[3 + (not merged)])


def _trace_back(tensor: gs.Tensor) -> _Scores | str:
    """From the softmax back to the product of q and k, along the scores; or what is in the way."""
    steps: list[gs.Node] = []
    carried: list[int] = []
    sink = None
    while (node := producer(tensor)) is not None:
        if node.op == "MatMul":
            return _Scores(node, steps[::-1], carried[::-1], sink)
        if node.op == "Sub" and _is_own_maximum(node.inputs[1], node.inputs[0]):
            tensor = node.inputs[0]  # a softmax doesn't see it
            continue
        if node.op == "Concat" and len(node.inputs) == 2 and not steps and sink is None:
            if node.attrs.get("axis") not in (-1, len(node.outputs[0].shape or ()) - 1):
                return f"{node.name} joins its scores along another axis than the keys'"
            tensor, sink = node.inputs
            continue
        if node.op in ("Cast", "Reshape", "Tanh"):
            along = [0]
        elif node.op in ("Add", "Sub", "Mul", "Div", "Where"):
            along = [i for i, t in enumerate(node.inputs) if not _aside(t)]
        else:
            return f"{node.name} ({node.op}) is between its product and its softmax"
        if len(along) != 1 or (node.op in ("Sub", "Div") and along != [0]) or (node.op == "Where" and along == [0]):
            return f"{node.name} joins the scores with what depends on the tokens"
        steps.append(node)
        carried.extend(along)
        tensor = node.inputs[along[0]]
    return "its scores are no product"


def _aside(tensor: gs.Tensor) -> bool:
    """Whether a tensor depends on positions and sizes alone."""
    return isinstance(tensor, gs.Constant) or PositionFunction([tensor]).dependence() is None


def _is_own_maximum(maximum: gs.Tensor, x: gs.Tensor) -> bool:
    node = producer(maximum, "ReduceMax")
    if node is None or node.inputs[0] is not x or not node.attrs.get("keepdims", 1):
        return False
    return ints(operand(node, 1)) in ([-1], [len(x.shape or ()) - 1])
