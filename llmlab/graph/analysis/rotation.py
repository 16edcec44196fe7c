"""What the nodes between two tensors do to a head, found out by calling them: is it a rotary embedding, and which?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.analysis.evaluate import CannotEvaluate, Excerpt, PositionFunction
from llmlab.graph.edit import producer, value
from llmlab.kernels.reference import rope

MOVES = frozenset(
    ("Add", "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Mul", "Neg", "Reshape", "RotaryEmbedding")
) | {"Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
"""Operators that a rotary embedding may be written with."""
_MOST_NODES = 40
_PROBES = 6  # positions at which every channel is asked about
_ROWS = 1 << 23  # numbers in one call
_TOLERANCE = 1e-5
OWN_POSITION = "cos or sin depend on more than a token's own position, such as the sequence's length"


@dataclass(frozen=True)
class Rotation:
    """Tables [positions, width / 2] that turn the first `width` channels, as pairs (2i, 2i + 1) where `interleaved`."""

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    interleaved: bool

    @property
    def width(self) -> int:
        return 2 * self.cos.shape[1]


@dataclass(frozen=True)
class Region:
    """The nodes between `x` and `y`, and the tensors that they read besides x and constants: all depend on positions."""

    x: gs.Tensor
    y: gs.Tensor
    nodes: tuple[gs.Node, ...]
    tables: tuple[gs.Tensor, ...]

    def signature(self) -> Hashable:
        """Equal for regions that compute the same of another x, such as those of all layers."""
        numbers: dict[int, int] = {id(self.x): 0}

        def known(tensor: gs.Tensor) -> Hashable:
            if any(tensor is t for t in self.tables):
                return tensor.name
            array = value(tensor)
            if array is not None:
                return array.dtype.str, array.shape, array.tobytes()
            return tensor.name if isinstance(tensor, gs.Constant) else numbers.setdefault(id(tensor), len(numbers))

        body = tuple(
            (n.op, str(sorted(n.attrs.items())), tuple(map(known, n.inputs)), tuple(map(known, n.outputs)))
            for n in reversed(self.nodes)
        )
        return tuple(self.x.shape or ()), body


def enclose(y: gs.Tensor, order: Mapping[int, int], positional: Mapping[int, bool]) -> Region | None:
    """The smallest region that ends in `y`, meets positions, and starts from one tensor; None where there is none.

    order: each node's place. positional: by tensor, False where it depends on tokens; constants are absent.
    """
    pending: dict[int, gs.Tensor] = {id(y): y}
    tables: dict[int, gs.Tensor] = {}
    nodes: list[gs.Node] = []
    while len(pending) > 1 or not tables:
        makers = [m for t in pending.values() if (m := producer(t)) is not None]
        if not makers or len(nodes) == _MOST_NODES:
            return None
        node = max(makers, key=lambda m: order[id(m)])
        if node.op not in MOVES:
            return None
        nodes.append(node)
        for out in node.outputs:
            pending.pop(id(out), None)
        for tensor in node.inputs:
            if (known := positional.get(id(tensor))) is not None:
                (tables if known else pending)[id(tensor)] = tensor
    (x,) = pending.values() if pending else (None,)
    return None if x is None else Region(x, y, tuple(nodes), tuple(tables.values()))


def identify(region: Region, tokens: int, length: int) -> Rotation | str:
    """The rotation that a region does to x, for `length` positions; or why it is none.

    tokens: the axis of x [batch, heads, sequence, dim] (or heads and sequence the other way round) that counts tokens.
    """
    try:
        tables = _tabulate(region.tables, length)
        return tables if isinstance(tables, str) else _Prober(region, tokens, tables).rotation(length)
    except CannotEvaluate as problem:
        return f"cos or sin can't be evaluated ({problem})"


@dataclass(frozen=True)
class _Table:
    """A tensor's values at every position, `axis` counting them (None: the same everywhere)."""

    values: np.ndarray
    axis: int | None

    def at(self, positions: NDArray[np.int64]) -> np.ndarray:
        return self.values if self.axis is None else np.take(self.values, positions, self.axis)


def _tabulate(tensors: tuple[gs.Tensor, ...], length: int) -> list[_Table] | str:
    """The tensors as tables over positions, or why they are none."""
    function = PositionFunction(list(tensors))
    if (reason := function.dependence()) is not None:
        return f"cos or sin {reason}"
    every = function(np.arange(length)[None])
    given = any(n.op != "Shape" and any(t.name == "position_ids" for t in n.inputs) for n in function.nodes)
    rng = np.random.default_rng(0)
    probes = [rng.integers(0, length, (2, 5))] if given else [np.arange(min(n, length))[None] for n in (1, 2, 7, 33)]
    result = []
    for i, full in enumerate(every):
        axes = [a for a, n in enumerate(full.shape) if n == length]
        for probe in probes:
            found = function(probe)[i]
            axes = [a for a in axes if found.ndim == full.ndim and found.shape[a] == probe.shape[1]]
            table = _Table(full, axes[0] if axes else None)
            for b, positions in enumerate(probe):
                expected = table.at(positions)
                own = found[b : b + 1] if found.shape != expected.shape and found.shape[:1] == (len(probe),) else found
                if own.shape != expected.shape or not np.array_equal(own, expected):
                    return OWN_POSITION
        result.append(_Table(full, axes[0] if axes else None))
    return result


class _Prober:
    def __init__(self, region: Region, tokens: int, tables: list[_Table]) -> None:
        self._function = Excerpt([region.x, *region.tables], [region.y])
        self._tokens, self._tables = tokens, tables
        _, *middle, self.dim = list(region.x.shape or ())
        self.heads = middle[2 - tokens]
        self._called_with = self.heads

    def __call__(self, x: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """x [T, dim], in every head alike, at `positions` [T] → [T, dim]; raises CannotEvaluate where heads differ."""
        heads = np.repeat(x[:, None], self._called_with, 1)[None]
        if self._tokens == 2:
            heads = heads.transpose(0, 2, 1, 3)
        (y,) = self._function(np.ascontiguousarray(heads), *(t.at(positions) for t in self._tables))
        if y.shape != heads.shape:
            raise CannotEvaluate(f"{list(heads.shape)} became {list(y.shape)}")
        by_head = np.moveaxis(y[0], 1 if self._tokens == 1 else 0, 0)
        if not (by_head == by_head[0]).all():
            raise CannotEvaluate("heads are turned differently")
        return np.asarray(by_head[0])

    def rotation(self, length: int) -> Rotation | str:
        rng = np.random.default_rng(0)
        positions = rng.integers(0, length, _PROBES)
        basis = np.tile(np.eye(self.dim, dtype=np.float32), (_PROBES, 1))
        # turned[p, i, o]: how much of channel i is in channel o at probe p
        turned = self(basis, np.repeat(positions, self.dim)).reshape(_PROBES, self.dim, self.dim)
        pairs = _pairs(turned)
        if isinstance(pairs, str):
            return pairs
        first, second, interleaved = pairs
        cos, sin = (np.empty((length, len(first)), np.float32) for _ in range(2))
        unit = np.zeros((length, self.dim), np.float32)
        unit[:, first] = 1  # (1, 0) turns into (cos, sin)
        step = self._rows_a_call()
        for start in range(0, length, step):
            rows = slice(start, start + step)
            y = self(unit[rows], np.arange(length)[rows])
            cos[rows], sin[rows] = y[:, first], y[:, second]
        x, at = rng.standard_normal((32, self.dim)).astype(np.float32), rng.integers(0, length, 32)
        expected = rope(x[:, None], at, cos, sin, interleaved=interleaved)[:, 0]
        if np.abs(self(x, at) - expected).max() > _TOLERANCE * np.abs(expected).max():
            return "it does more than turn pairs of channels"
        return Rotation(cos, sin, interleaved)

    def _rows_a_call(self) -> int:
        """One head is enough wherever the region doesn't insist on how many there are."""
        try:
            self._called_with = 1
            self(np.zeros((2, self.dim), np.float32), np.arange(2) % self._tables_length())
        except CannotEvaluate:
            self._called_with = self.heads
        return max(1, _ROWS // (self._called_with * self.dim))

    def _tables_length(self) -> int:
        return min((t.values.shape[t.axis] for t in self._tables if t.axis is not None), default=1)


def _pairs(turned: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64], bool] | str:
    """First and second channels of the pairs that turn, and whether they lie side by side."""
    dim = turned.shape[-1]
    across = np.argwhere(np.abs(turned).max(0) * (1 - np.eye(dim)) > 1e-6)
    if not len(across):
        return "it turns no channel"
    distance = {abs(int(i - o)) for i, o in across}
    if len(distance) > 1:
        return "it mixes more than two channels"
    (apart,) = distance
    interleaved = apart == 1 and int(across.max()) > 1
    width = int(across.max()) // 2 * 2 + 2 if interleaved else 2 * apart
    if width > dim:
        return "it turns channels with partners that aren't there"
    index = np.arange(width)
    first, second = (index[0::2], index[1::2]) if interleaved else (index[:apart], index[apart:])
    expected = np.tile(np.eye(dim, dtype=np.float32), (len(turned), 1, 1))
    cos, sin = turned[:, first, first], turned[:, first, second]
    expected[:, first, first] = expected[:, second, second] = cos
    expected[:, first, second], expected[:, second, first] = sin, -sin
    if np.abs(turned - expected).max() > _TOLERANCE * max(1.0, float(np.abs(turned).max())):
        return "the two channels of a pair turn differently, or the rest doesn't stay as it is"
    return first, second, interleaved
