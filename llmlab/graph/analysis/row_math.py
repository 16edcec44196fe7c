"""Rules about rows for operators that compute: products, reductions, norms and what works along one axis."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.graph.analysis.row_facts import AGAINST, ALONG, COMPUTED, Rows, Rule, broadcast, kept
from llmlab.graph.edit import ints, operand, scalar


def matmul(rows: Rows) -> str | None:
    """Tokens may be rows of the left side, columns of the right side, or a batch axis of either; never what is summed."""
    a, b = rows.axes[:2]
    left, right = rows.shape(0), rows.shape(1)
    summed_left, summed_right = len(left) - 1, max(len(right) - 2, 0)
    if a == summed_left or (b is not None and b == summed_right) or (len(left) == 1 and a is not None):
        return "it sums over tokens"
    if len(left) == 1 or len(right) == 1:
        vector_right = len(right) == 1 and b is None and rows.first == rows.out
        return None if vector_right else "it multiplies tokens with a vector in an unknown way"
    at = {axis - len(shape) for axis, shape in ((a, left), (b, right)) if axis is not None}
    if len(at) != 1 or at != {rows.out - rows.rank}:
        return "it multiplies tokens with each other"
    (from_end,) = at
    return None if from_end >= -2 else broadcast(rows, (0, 1))


def gemm(rows: Rows) -> str | None:
    attrs = rows.node.attrs
    a, b = rows.axes[:2]
    if a is not None and b is not None:
        return "it multiplies tokens with each other"
    outer = 0 if a is not None else 1
    turned = bool(attrs.get("transA" if a is not None else "transB", 0))
    axis = a if a is not None else b
    if axis is not None and axis != (1 - outer if turned else outer):
        return "it sums over tokens"
    return (kept(rows, outer) if axis is not None else None) or (broadcast(rows, (2,)) if len(rows.axes) > 2 else None)


def einsum(rows: Rows) -> str | None:
    sides = str(rows.node.attrs.get("equation", "")).replace(" ", "").split("->")
    if len(sides) != 2 or "." in sides[0]:
        return "its equation has no output or an ellipsis"
    terms = sides[0].split(",")
    labels = {term[a] for term, a in zip(terms, rows.axes, strict=True) if a is not None}
    if len(labels) != 1:
        return AGAINST
    (label,) = labels
    if any((term.count(label) == 1) != (a is not None) for term, a in zip(terms, rows.axes, strict=True)):
        return "it multiplies tokens with each other"
    return None if sides[1].count(label) == 1 and sides[1].index(label) == rows.out else "it sums over tokens"


def reduction(rows: Rows) -> str | None:
    given = operand(rows.node, 1)
    axes = ints(given) if given is not None else list(rows.node.attrs.get("axes", ()))
    if axes is None:
        return COMPUTED
    if not axes and rows.node.attrs.get("noop_with_empty_axes", 0):
        return kept(rows, rows.first)
    return _reduced(rows, axes)


def arg_reduction(rows: Rows) -> str | None:
    return _reduced(rows, [int(rows.node.attrs.get("axis", 0))])


def _reduced(rows: Rows, axes: Sequence[int]) -> str | None:
    gone = {a % len(rows.shape(0)) for a in axes}
    if not gone or rows.first is None or rows.first in gone:
        return ALONG
    moved = 0 if rows.node.attrs.get("keepdims", 1) else -sum(g < rows.first for g in gone)
    return kept(rows, rows.first, moved)


def along(default: int) -> Rule:
    """Operators along one axis that keep the shape's order: Softmax, TopK, Split."""

    def rule(rows: Rows) -> str | None:
        if rows.axis(default, len(rows.shape(0))) == rows.first:
            return ALONG
        return rows.alone() or kept(rows, rows.first)

    return rule


def cumulative(rows: Rows) -> str | None:
    axis = scalar(operand(rows.node, 1))
    if axis is None:
        return COMPUTED
    return ALONG if int(axis) % rows.rank == rows.first else kept(rows, rows.first)


def one_hot(rows: Rows) -> str | None:
    if rows.first is None:
        return AGAINST
    axis = rows.axis(-1, rows.rank)
    return rows.alone() or kept(rows, rows.first, int(axis <= rows.first))


def norm(rows: Rows) -> str | None:
    """LayerNormalization, RMSNormalization: over all axes from `axis` on."""
    if rows.first is None or rows.axis(-1, len(rows.shape(0))) <= rows.first:
        return ALONG
    return rows.alone() or kept(rows, rows.first)


def trilu(rows: Rows) -> str | None:
    return ALONG if rows.first is None or rows.first >= rows.rank - 2 else rows.alone() or kept(rows, rows.first)


def quantization(rows: Rows) -> str | None:
    if rows.alone() is not None or rows.first is None:
        return AGAINST
    per_axis = len(rows.shape(1)) > 0 and rows.shape(1) != [1]
    return ALONG if per_axis and rows.axis(1, rows.rank) == rows.first else kept(rows, rows.first)


def rotary(rows: Rows) -> str | None:
    """x [1, heads, T, dim] or [1, T, heads · dim]; cos and sin with positions [1, T], or gathered by them [1, T, …]."""
    tokens = len(rows.shape(0)) - 2
    others = [a for i, a in enumerate(rows.axes) if i and operand(rows.node, i) is not None]
    gathered = len(others) == 2
    right = rows.first == tokens == rows.out and others == ([1, 1] if gathered else [None, None, 1])
    return None if right else AGAINST


def experts(rows: Rows) -> str | None:
    """MixtureOfExperts: tokens, what routes them, and weights."""
    return None if {a for a in rows.axes if a is not None} == {rows.out} else AGAINST
