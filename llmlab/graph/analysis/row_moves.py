"""Rules about rows for operators that move numbers and compute none: Reshape, Slice, Gather and their like."""

from __future__ import annotations

from llmlab.graph.analysis.row_facts import AGAINST, ALONG, COMPUTED, Rows, broadcast, kept
from llmlab.graph.edit import Dim, ints, operand


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
