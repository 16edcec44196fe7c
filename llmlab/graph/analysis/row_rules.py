"""Operator by operator: when does each row (token) of the output depend on the same row of the inputs alone?

Every rule gets the `Rows` of a node and returns None, or the reason why tokens may meet. Axes are those that count tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from llmlab.graph.analysis.operator_kinds import ELEMENTWISE, REDUCTIONS
from llmlab.graph.edit import Dim, constant_expression, ints, operand, scalar

ALONG = "it works along the token axis"
COMPUTED = "its axes are computed"
AGAINST = "its inputs count tokens along different axes"
NUMBERED = "it numbers tokens by their place in the step"


@dataclass(frozen=True)
class Rows:
    """A node with its token axes: of each input (None where it has none), and of its outputs."""

    node: gs.Node
    axes: tuple[int | None, ...]
    out: int

    def shape(self, index: int) -> list[Dim]:
        return list(self.node.inputs[index].shape or ())

    @property
    def rank(self) -> int:
        return len(self.node.outputs[0].shape or ())

    @property
    def first(self) -> int | None:
        return self.axes[0]

    def axis(self, default: int, rank: int) -> int:
        """The attribute `axis`, counted from the front."""
        return int(self.node.attrs.get("axis", default)) % rank

    def alone(self) -> str | None:
        """A reason where any input but the first counts tokens."""
        return AGAINST if any(a is not None for a in self.axes[1:]) else None


Rule = Callable[[Rows], str | None]


def kept(rows: Rows, axis: int | None, moved: int = 0) -> str | None:
    """None where the token axis `axis` of the input is the output's, `moved` by axes that come or go before it."""
    return None if axis is not None and axis + moved == rows.out else "it moves the token axis in an unknown way"


def broadcast(rows: Rows, among: Sequence[int] | None = None) -> str | None:
    """Inputs meet aligned at their last axes: all count tokens at the same place, or are the same for all tokens."""
    from_end = rows.out - rows.rank
    for i in range(len(rows.axes)) if among is None else among:
        if operand(rows.node, i) is None:
            continue
        shape, axis = rows.shape(i), rows.axes[i]
        if axis is not None:
            if axis - len(shape) != from_end:
                return AGAINST
        elif len(shape) >= -from_end and shape[from_end] != 1:
            return f"input {i} has a row of its own for each of {shape[from_end]} tokens"
    return None


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


def gather(rows: Rows) -> str | None:
    data, index = rows.axes[:2]
    axis = rows.axis(0, len(rows.shape(0)))
    if index is not None:
        return kept(rows, index, axis) if data is None else "it picks among tokens"
    if data == axis:
        return "it picks among tokens"
    moved = len(rows.shape(1)) - 1 if data is not None and data > axis else 0
    return kept(rows, data, moved)


def gather_nd(rows: Rows) -> str | None:
    data, index = rows.axes[:2]
    batch = int(rows.node.attrs.get("batch_dims", 0))
    if index is None or index >= len(rows.shape(1)) - 1:
        return "it picks among tokens"
    if index < batch:
        return kept(rows, index) if data == index else "it picks among tokens"
    return kept(rows, index) if data is None else "it picks among tokens"


def aligned(rows: Rows) -> str | None:
    """GatherElements, ScatterElements: all inputs have a row for each token, and the axis is another."""
    if any(a != rows.out for a in rows.axes):
        return AGAINST
    return ALONG if rows.axis(0, rows.rank) == rows.out else None


def transpose(rows: Rows) -> str | None:
    perm = list(rows.node.attrs.get("perm", ())) or list(range(rows.rank))[::-1]
    return None if perm[rows.out] == rows.first else "it moves the token axis in an unknown way"


def reshape(rows: Rows) -> str | None:
    """Rows stay rows where the sizes before the token axis multiply to the same on both sides."""
    if rows.first is None:
        return "its input has no token axis"
    before = _product(rows.shape(0)[: rows.first])
    after = _product(list(rows.node.outputs[0].shape or ())[: rows.out])
    return None if before is not None and before == after else "it may mix tokens with another axis"


def _product(shape: list[Dim]) -> int | None:
    total = 1
    for dim in shape:
        if not isinstance(dim, int):
            return None
        total *= dim
    return total


def squeeze(rows: Rows) -> str | None:
    axes = ints(operand(rows.node, 1))
    if axes is None:
        return COMPUTED  # also where there are none: a single token would be squeezed away
    gone = {a % len(rows.shape(0)) for a in axes}
    if rows.first is None or rows.first in gone:
        return ALONG
    return kept(rows, rows.first, -sum(g < rows.first for g in gone))


def unsqueeze(rows: Rows) -> str | None:
    axes = ints(operand(rows.node, 1))
    if axes is None:
        return COMPUTED
    new = {a % rows.rank for a in axes}
    old = [i for i in range(rows.rank) if i not in new]
    return None if rows.out in old and old.index(rows.out) == rows.first else ALONG


def expand(rows: Rows) -> str | None:
    return broadcast(rows, (0,))


def tile(rows: Rows) -> str | None:
    repeats = ints(operand(rows.node, 1))
    if repeats is None:
        return COMPUTED
    return kept(rows, rows.first) if rows.first is not None and repeats[rows.first] == 1 else ALONG


def concat(rows: Rows) -> str | None:
    if rows.axis(0, rows.rank) == rows.out:
        return ALONG
    return None if all(a == rows.out for a in rows.axes) else AGAINST


def slice_(rows: Rows) -> str | None:
    starts, steps = ints(operand(rows.node, 1)), operand(rows.node, 4)
    if operand(rows.node, 3) is None:
        axes = None if starts is None else list(range(len(starts)))
    else:
        axes = ints(operand(rows.node, 3))
    if axes is None or (steps is not None and ints(steps) is None):
        return COMPUTED
    return ALONG if rows.first in [a % rows.rank for a in axes] else kept(rows, rows.first)


def pad(rows: Rows) -> str | None:
    pads = ints(operand(rows.node, 1))
    given = operand(rows.node, 3)
    axes = list(range(rows.rank)) if given is None else ints(given)
    if pads is None or axes is None:
        return COMPUTED
    for i, axis in enumerate(axes):
        if axis % rows.rank == rows.out and (pads[i] or pads[i + len(axes)]):
            return ALONG
    return kept(rows, rows.first)


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


_RULES: dict[str, Rule] = {
    "ArgMax": arg_reduction,
    "ArgMin": arg_reduction,
    "CastLike": lambda rows: kept(rows, rows.first),
    "Concat": concat,
    "CumProd": cumulative,
    "CumSum": cumulative,
    "DequantizeLinear": quantization,
    "Einsum": einsum,
    "Expand": expand,
    "Flatten": reshape,
    "Gather": gather,
    "GatherElements": aligned,
    "GatherND": gather_nd,
    "GatedActivation": along(-1),
    "MixtureOfExperts": experts,
    "Gemm": gemm,
    "Hardmax": along(-1),
    "LayerNormalization": norm,
    "LogSoftmax": along(-1),
    "LpNormalization": along(-1),
    "MatMul": matmul,
    "OneHot": one_hot,
    "Pad": pad,
    "QuantizeLinear": quantization,
    "RMSNormalization": norm,
    "Reshape": reshape,
    "RotaryEmbedding": rotary,
    "ScatterElements": aligned,
    "Slice": slice_,
    "Softmax": along(-1),
    "Split": along(0),
    "Squeeze": squeeze,
    "Tile": tile,
    "TopK": along(-1),
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, broadcast),
    **dict.fromkeys(REDUCTIONS, reduction),
    **_RULES,
}
"""By operator, in ONNX's own domain and ONNX Runtime's."""

SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,)}
"""Inputs that only say how large the output is: they may depend on the number of tokens."""


def constant_rows(node: gs.Node, out: int) -> str | None:
    """For a node whose output counts tokens though no input does: whether all its rows are the same."""
    if node.op == "ConstantOfShape":
        return None
    if node.op == "Expand":
        return broadcast(Rows(node, (None,) * len(node.inputs), out), (0,))
    return NUMBERED if not all(constant_expression(t) for t in node.inputs) else None
