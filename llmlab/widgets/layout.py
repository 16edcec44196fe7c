"""Places for the boxes of a small graph: layers from top to bottom, few crossings, what belongs together near by.

The steps of Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System Structures" (1981): layers by
the longest path, order in a layer by the mean of the neighbours, then places as near to the neighbours as the order allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]

_SWEEPS = 8
_BESIDE, _BELOW = 14.0, 26.0  # pixels between boxes
_BEND = 8.0  # width of an edge that passes a layer


@dataclass
class Layout:
    """Where boxes and edges go, in pixels."""

    width: float
    height: float
    corners: dict[str, Point]
    """Upper left corner of each box."""
    routes: dict[tuple[str, str], list[Point]]
    """The points that an edge goes through, from the lower side of its first box to the upper side of its second."""


@dataclass
class _Cell:
    width: float
    height: float
    layer: int
    above: list[_Cell] = field(default_factory=list)
    below: list[_Cell] = field(default_factory=list)
    at: float = 0.0
    """Place in its layer, then the x of its middle."""


def layout(sizes: Mapping[str, Point], edges: Iterable[tuple[str, str]]) -> Layout:
    """Lay boxes of the given (width, height) out. Edges to or from what is no box, and from a box to itself, are left out.

    Boxes in a cycle keep the order that they are given in.
    """
    wanted = list(dict.fromkeys((a, b) for a, b in edges if a in sizes and b in sizes and a != b))
    if not sizes:
        return Layout(0, 0, {}, {})
    downward = _without_cycles(list(sizes), wanted)
    layers = _layers(list(sizes), downward)
    cells = {name: _Cell(*size, layers[name]) for name, size in sizes.items()}
    bends = {pair: _connect(cells[pair[0]], cells[pair[1]]) for pair in downward}
    rows: list[list[_Cell]] = [[] for _ in range(1 + max(layers.values()))]
    for cell in [*cells.values(), *(c for chain in bends.values() for c in chain)]:
        rows[cell.layer].append(cell)
    _order(rows)
    _place(rows)
    tops, y = [], 0.0
    for row in rows:
        tops.append(y)
        y += max(c.height for c in row) + _BELOW
    left = min(c.at - c.width / 2 for row in rows for c in row)
    right = max(c.at + c.width / 2 for row in rows for c in row)
    corners = {n: (c.at - c.width / 2 - left, tops[c.layer]) for n, c in cells.items()}
    routes = {}
    for a, b in wanted:
        upper, lower = (a, b) if (a, b) in bends else (b, a)
        above, below = cells[upper], cells[lower]
        points = [(above.at - left, tops[above.layer] + above.height)]
        for bend in bends[upper, lower]:
            room = max(c.height for c in rows[bend.layer])
            points += [(bend.at - left, tops[bend.layer]), (bend.at - left, tops[bend.layer] + room)]
        points.append((below.at - left, tops[below.layer]))
        routes[a, b] = points if upper == a else points[::-1]
    return Layout(right - left, y - _BELOW, corners, routes)


def _without_cycles(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges, those turned round that would close a cycle."""
    ahead: dict[str, list[str]] = {name: [] for name in names}
    for a, b in edges:
        ahead[a].append(b)
    state: dict[str, int] = {}
    result: dict[tuple[str, str], None] = {}
    for start in names:
        stack = [] if start in state else [(start, iter(ahead[start]))]
        state.setdefault(start, 1)
        while stack:
            here, rest = stack[-1]
            goal = next(rest, None)
            if goal is None:
                state[here] = 2
                stack.pop()
            elif state.get(goal) == 1:
                result.setdefault((goal, here))
            else:
                result.setdefault((here, goal))
                if goal not in state:
                    state[goal] = 1
                    stack.append((goal, iter(ahead[goal])))
    return list(result)


def _layers(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest path to each box; boxes that only what has no input leads to stand right above what they lead to."""
    above: dict[str, list[str]] = {name: [] for name in names}
    below: dict[str, list[str]] = {name: [] for name in names}
    for a, b in edges:
        above[b].append(a)
        below[a].append(b)
    waiting = {name: len(above[name]) for name in names}
    ready = [name for name in names if not waiting[name]]
    order: list[str] = []
    layer: dict[str, int] = {}
    for name in ready:  # grows while it is walked
        order.append(name)
        layer[name] = max((layer[a] + 1 for a in above[name]), default=0)
        for b in below[name]:
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    side: set[str] = set()  # chains, such as a weight and its transposition: one reader, no input that branches
    for name in order:
        if all(a in side for a in above[name]) and len(below[name]) == 1:
            side.add(name)
    for name in reversed(order):
        if name in side:
            layer[name] = min(layer[b] for b in below[name]) - 1
    lowest = min(layer.values())
    return {name: at - lowest for name, at in layer.items()}


def _connect(above: _Cell, below: _Cell) -> list[_Cell]:
    """Bends of an edge, one in each layer that it passes."""
    chain = [_Cell(_BEND, 0, layer) for layer in range(above.layer + 1, below.layer)]
    for upper, lower in zip([above, *chain], [*chain, below], strict=True):
        upper.below.append(lower)
        lower.above.append(upper)
    return chain


def _order(rows: list[list[_Cell]]) -> None:
    """Sort each row by the mean place of its neighbours, down and up again; the best order that was seen stays."""
    best, fewest = [list(row) for row in rows], None
    for sweep in range(_SWEEPS):
        for row in rows:
            for at, cell in enumerate(row):
                cell.at = at
        crossings = sum(_crossings(row) for row in rows)
        if fewest is None or crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
        if not crossings:
            break
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            means = {id(c): _mean(c.above if down else c.below, c.at) for c in row}
            row.sort(key=lambda c: means[id(c)])
            for at, cell in enumerate(row):
                cell.at = at
    for row, order in zip(rows, best, strict=True):
        row[:] = order


def _crossings(row: list[_Cell]) -> int:
    """How many pairs of edges between `row` and the one below cross."""
    ends = [e for c in row for e in sorted(b.at for b in c.below)]
    return sum(ends[i] > later for i in range(len(ends)) for later in ends[i + 1 :])


def _mean(cells: list[_Cell], otherwise: float) -> float:
    return sum(c.at for c in cells) / len(cells) if cells else otherwise


def _place(rows: list[list[_Cell]]) -> None:
    """Turn orders into x: each row as near to its neighbours' means as its order and widths allow, down and up in turn."""
    for row in rows:
        _settle(row, [0.0] * len(row))
    for sweep in range(_SWEEPS):
        last = sweep == _SWEEPS - 1
        for row in rows if sweep % 2 == 0 else reversed(rows):
            near = [c.above + c.below if last else c.above if sweep % 2 == 0 else c.below for c in row]
            _settle(row, [_mean(n, c.at) for n, c in zip(near, row, strict=True)])


def _settle(row: list[_Cell], wanted: list[float]) -> None:
    """The places nearest to `wanted` (least squares) at which nothing overlaps: isotonic regression by pooling."""
    offsets, x = [], 0.0
    for i, cell in enumerate(row):
        x += (row[i - 1].width + cell.width) / 2 + _BESIDE if i else 0
        offsets.append(x)
    pools: list[list[float]] = []  # [sum, count]
    for want, offset in zip(wanted, offsets, strict=True):
        pools.append([want - offset, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    level = [total / count for total, count in pools for _ in range(int(count))]
    for cell, start, offset in zip(row, level, offsets, strict=True):
        cell.at = start + offset
