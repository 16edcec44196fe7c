"""What `cut` returns: pieces, the tensors that cross between them, and both as tables."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

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

    def __rich__(self) -> RenderableType:
        table = Table(*_COLUMNS, title=repr(self), title_justify="left")
        for row in self._rows():
            table.add_row(*map(plain, row))
        return table

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = ([f"<small>{html.escape(cell)}</small>" for cell in row] for row in self._rows())
        page = f"<div>{html.escape(repr(self))}</div>{html_table(_COLUMNS, rows)}"
        return {"text/plain": repr(self), "text/html": page}

    def _rows(self) -> list[tuple[str, ...]]:
        letters: dict[str, str] = {}
        of = {c.name: c for c in self.crossings}
        rows: list[tuple[str, ...]] = []
        for piece in self.pieces:
            kind = letters.setdefault(piece.key, str(len(letters) + 1))
            ops = Counter(n.op for n in piece.graph.surgeon.nodes).most_common(4)
            reads = ", ".join(f"{n} of {of[n].made_by}" if n in of else n for n in piece.inputs)
            gives = ", ".join(f"{n} {_shape(of[n].shape)}" if n in of else n for n in piece.outputs)
            what = piece.name if piece.marked else ", ".join(f"{count} {op}" for op, count in ops)
            rows.append((str(piece.index), kind, what, str(len(piece.graph.surgeon.nodes)), reads, gives))
        return rows


_COLUMNS = ("piece", "kind", "what", "nodes", "reads", "gives")


def _shape(shape: Sequence[Dim] | None) -> str:
    return "[" + ", ".join(map(str, shape or ())) + "]" if shape is not None else "[?]"
