"""Nodes that change nothing go; reshapes by computed sizes become reshapes by known ones."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Dim, Editor, constant_expression, ints, operand, producer, scope, value
from llmlab.graph.rewrite import Match, Pass

_FAR = 1 << 30  # a Slice that ends here or later ends at the end


class RemoveNoOps(Pass):
    """Identity, Cast to the same type, Slice of everything, Expand to the same shape, pairs that undo each other."""

    name = "remove_no_ops"

    def pattern(self, node: gs.Node) -> Match | None:
        source = _passes_through(node)
        return None if source is None else Match(node=node, source=source)

    def rewrite(self, edit: Editor, match: Match) -> None:
        if edit.is_output(match.node.outputs[0]) and producer(match.source) is None:
            return  # an output must not be an input
        edit.replace(match.node.outputs[0], match.source)


def _passes_through(node: gs.Node) -> gs.Tensor | None:
    """The tensor that the node's output always equals, if there is one."""
    if not node.inputs:
        return None
    source, out = node.inputs[0], node.outputs[0]
    if node.op in ("Identity", "Dropout"):
        return source
    if node.op in ("Cast", "CastLike"):
        return (
            source
            if source.dtype is not None and out.dtype is not None and source.dtype == out.dtype and _kept(source, node)
            else None
        )
    if node.op == "Slice":
        starts, ends, steps = ints(operand(node, 1)), ints(operand(node, 2)), ints(operand(node, 4))
        whole = starts is not None and ends is not None and not any(starts) and all(e >= _FAR for e in ends)
        return source if whole and (operand(node, 4) is None or steps == [1] * len(starts or ())) else None
    if node.op in ("Expand", "Reshape"):
        return source if same_shape(source.shape, out.shape) else None
    if node.op == "Transpose":
        perm = list(node.attrs.get("perm", ()))
        if perm == list(range(len(perm))) and perm:
            return source
        before = producer(source, "Transpose")
        if before is not None and perm and "perm" in before.attrs:
            inner = list(before.attrs["perm"])
            if [inner[p] for p in perm] == list(range(len(perm))):
                return before.inputs[0]
    if node.op == "Squeeze":
        before = producer(source, "Unsqueeze")
        if before is not None and ints(operand(node, 1)) == ints(operand(before, 1)) is not None:
            return before.inputs[0]
    return None


def _kept(source: gs.Tensor, node: gs.Node) -> bool:
    """Whether the declared types can be believed: a Cast says its own."""
    target = node.attrs.get("to")
    return target is None or (
        source.dtype is not None
        and not isinstance(source.dtype, int)
        and target == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(source.dtype))
    )


def same_shape(a: list[Dim] | None, b: list[Dim] | None) -> bool:
    """Whether two declared shapes are known and equal, symbol by symbol."""
    return a is not None and b is not None and None not in a and list(a) == list(b)


class StaticReshape(Pass):
    """Reshape by computed sizes → Reshape by constants (0 copies a size, one -1 is inferred)."""

    name = "static_reshape"

    def pattern(self, node: gs.Node) -> Match | None:
        if node.op != "Reshape" or value(node.inputs[1]) is not None or constant_expression(node.inputs[1]):
            return None
        return Match(node=node)

    def check(self, edit: Editor, match: Match) -> str | None:
        source, out = match.node.inputs[0].shape, match.node.outputs[0].shape
        if source is None or out is None:
            return "the shape of its input or output isn't known"
        target = static_target(list(source), list(out))
        if target is None:
            return f"{source} → {out} has more than one size that changes and isn't known"
        match.target = target
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        node = match.node
        node.inputs[1] = edit.constant(f"{node.name}/shape", np.asarray(match.target, np.int64))
        node.attrs.pop("allowzero", None)


def static_target(source: list[Dim], out: list[Dim]) -> list[int] | None:
    """The constant that reshapes `source` to `out`: known sizes, 0 where a symbol stays in place, at most one -1."""
    target: list[int] = []
    for i, dim in enumerate(out):
        if isinstance(dim, int):
            target.append(dim)
        elif dim is not None and i < len(source) and source[i] == dim:
            target.append(0)
        elif -1 in target:
            return None
        else:
            target.append(-1)
    return target


class MergeReshapes(Pass):
    """Reshape of a Reshape → one Reshape, where the sizes are constants and copy nothing from between."""

    name = "merge_reshapes"

    def pattern(self, node: gs.Node) -> Match | None:
        before = producer(node.inputs[0], "Reshape") if node.op == "Reshape" else None
        return None if before is None else Match(node=node, before=before)

    def check(self, edit: Editor, match: Match) -> str | None:
        target, middle = ints(match.node.inputs[1]), ints(match.before.inputs[1])
        if target is None or middle is None:
            return "its sizes are computed"
        source, between = match.before.inputs[0].shape, match.before.outputs[0].shape
        for i, dim in enumerate(target):
            if dim == 0 and not (
                source is not None
                and between is not None
                and i < min(len(source), len(between))
                and source[i] == between[i]
            ):
                return f"size {i} is copied from a shape that the first Reshape changes"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        match.node.inputs[0] = match.before.inputs[0]


class SplitWithoutSequence(Pass):
    """SplitToSequence → Split, where every part is taken out by a constant number."""

    name = "split_without_sequence"

    def pattern(self, node: gs.Node) -> Match | None:
        return Match(node=node) if node.op == "SplitToSequence" else None

    def check(self, edit: Editor, match: Match) -> str | None:
        node = match.node
        axis, split, shape = node.attrs.get("axis", 0), ints(operand(node, 1)), node.inputs[0].shape
        size = shape[axis] if shape is not None else None
        if split is None or not isinstance(size, int) or not node.attrs.get("keepdims", 1):
            return "the sizes of its parts aren't known"
        if len(node.inputs[1].shape) == 0:  # one number: parts of that size, the last one takes what is left
            split = [min(split[0], size - at) for at in range(0, size, split[0])]
        match.sizes = split
        match.taken = {id(n): ints(n.inputs[1]) for n in node.outputs[0].outputs if n.op == "SequenceAt"}
        if edit.is_output(node.outputs[0]) or len(match.taken) != len(node.outputs[0].outputs):
            return "something else than SequenceAt reads it"
        return None if all(match.taken.values()) else "the number of a part is computed"

    def rewrite(self, edit: Editor, match: Match) -> None:
        node = match.node
        axis, shape, dtype = node.attrs.get("axis", 0), list(node.inputs[0].shape), node.inputs[0].dtype
        sizes = edit.constant(f"{node.name}/sizes", np.asarray(match.sizes, np.int64))
        outputs = [(dtype, [s if i == axis % len(shape) else d for i, d in enumerate(shape)]) for s in match.sizes]
        parts = edit.add_many("Split", scope(node), [node.inputs[0], sizes], {"axis": axis}, outputs)
        for at in list(node.outputs[0].outputs):
            edit.replace(at.outputs[0], parts[match.taken[id(at)][0]])
