"""What `cut` returns: pieces, the tensors that cross between them, and both as tables."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from llmlab.graph.edit import Dim
from llmlab.graph.graph import Graph
from llmlab.graph.reports.render import html_table, plain

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A part of a graph that runs by itself. Pieces with the same `key` differ in names and weights alone."""

    index: int
    name: str
    marked: bool
    """Whether it is one node that the predicate chose, and not what lies between two."""
    graph: Graph
    key: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.graph.surgeon.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.graph.surgeon.outputs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "name": self.name,
            "marked": self.marked,
            "key": self.key,
            "nodes": len(self.graph.surgeon.nodes),
            "weight_bytes": self.graph.weight_bytes,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
        }

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        chosen = ", a chosen node" if self.marked else ""
        head = f"<div>piece {self.index}: <b>{html.escape(self.name)}</b>{chosen}, kind {html.escape(self.key)}</div>"
        return {"text/plain": repr(self), "text/html": head + self.graph._repr_mimebundle_()["text/html"]}


@dataclass(frozen=True)
class Crossing:
    """A tensor that one piece makes and others read."""

    name: str
    dtype: str
    shape: Sequence[Dim] | None
    made_by: int
    read_by: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        shape = None if self.shape is None else list(self.shape)
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": shape,
            "made_by": self.made_by,
            "read_by": list(self.read_by),
        }


@dataclass(frozen=True, repr=False)
class Cut:
    """A graph in pieces, in executable order. Inputs that no piece makes are the graph's own."""

    pieces: tuple[Piece, ...]
    crossings: tuple[Crossing, ...]
    outputs: tuple[str, ...]
    """The graph's outputs."""

    def run(self, feeds: Feeds, execute: Callable[[Piece, Feeds], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Run the pieces in turn and return the graph's outputs; each tensor is dropped after its last reader.

        execute: runs one piece on its inputs and returns its outputs, in the order of `piece.outputs`.
        """
        last = {name: piece.index for piece in self.pieces for name in piece.inputs}
        values = dict(feeds)
        for piece in self.pieces:
            made = execute(piece, {name: values[name] for name in piece.inputs})
            values.update(zip(piece.outputs, made, strict=True))
            for name in piece.inputs:
                if last[name] == piece.index and name not in self.outputs:
                    del values[name]
        return [values[name] for name in self.outputs]

    def to_dict(self) -> dict[str, Any]:
        return {
            "pieces": [piece.to_dict() for piece in self.pieces],
            "crossings": [crossing.to_dict() for crossing in self.crossings],
            "outputs": list(self.outputs),
        }

    def __repr__(self) -> str:
        keys = len({piece.key for piece in self.pieces})
        marked = sum(piece.marked for piece in self.pieces)
        return f"Cut({len(self.pieces)} pieces, {marked} at chosen nodes, {keys} different; {len(self.crossings)} tensors cross)"

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)

    def __rich__(self) -> RenderableType:
        """A paragraph for each kind of piece, with the names of the first one: as narrow as the names are."""
        kinds: dict[str, list[tuple[Piece, tuple[str, ...]]]] = {}
        for piece, row in zip(self.pieces, self._rows(), strict=True):
            kinds.setdefault(piece.key, []).append((piece, row))
        parts: list[RenderableType] = [plain(repr(self), "bold")]
        for alike in kinds.values():
            first, (_, kind, what, *_) = alike[0]
            which = ", ".join(str(piece.index) for piece, _ in alike)
            count = f"{len(first.graph.surgeon.nodes)} nodes: " if not first.marked else ""
            parts.append(
                plain(f"kind {kind}, {'pieces' if len(alike) > 1 else 'piece'} {which}: {count}{what}", "bold")
            )
            for verb, ends in (("reads", self._reads(first)), ("gives", self._gives(first))):
                parts += [plain(f"  {verb} {end}") for end in ends]
        return Group(*parts)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = ([f"<small>{html.escape(cell)}</small>" for cell in row] for row in self._rows())
        page = f"<div>{html.escape(repr(self))}</div>{html_table(_COLUMNS, rows)}"
        return {"text/plain": repr(self), "text/html": page}

    def _reads(self, piece: Piece) -> list[str]:
        made_by = {c.name: f" of {c.made_by}" for c in self.crossings}
        return [name + made_by.get(name, "") for name in piece.inputs]

    def _gives(self, piece: Piece) -> list[str]:
        shapes = {c.name: f" {_shape(c.shape)}" for c in self.crossings}
        return [name + shapes.get(name, "") for name in piece.outputs]

    def _rows(self) -> list[tuple[str, ...]]:
        letters: dict[str, str] = {}
        rows: list[tuple[str, ...]] = []
        for piece in self.pieces:
            kind = letters.setdefault(piece.key, str(len(letters) + 1))
            ops = Counter(n.op for n in piece.graph.surgeon.nodes).most_common(4)
            reads, gives = ", ".join(self._reads(piece)), ", ".join(self._gives(piece))
            what = piece.name if piece.marked else ", ".join(f"{count} {op}" for op, count in ops)
            rows.append((str(piece.index), kind, what, str(len(piece.graph.surgeon.nodes)), reads, gives))
        return rows


_COLUMNS = ("piece", "kind", "what", "nodes", "reads", "gives")


def _shape(shape: Sequence[Dim] | None) -> str:
    return "[" + ", ".join(map(str, shape or ())) + "]" if shape is not None else "[?]"
