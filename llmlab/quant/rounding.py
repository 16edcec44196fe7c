"""Weights rounded when they are written, one at a time: a model of any size is quantized in the memory of its largest weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.graph.edit import producer
from llmlab.graph.lower.weights import Expression, can_evaluate
from llmlab.graph.narrow import narrow_scale
from llmlab.graph.store.lazy import row
from llmlab.graph.store.storage import loaded
from llmlab.quant.grid import Grid, Rounded
from llmlab.quant.projections import Projection, rows_of


class Rounding:
    """A projection's weight rounded to nearest on a grid, computed each time it is asked for.

    experts: that of each expert's weight by itself, where the projection holds those of several and they share no scale.
    Raises InputError, which names the projection, where groups don't come out even; later also for a NaN or an infinity.
    """

    def __init__(self, projection: Projection, grid: Grid) -> None:
        self.grid, self.shape, self._name = grid, projection.shape, projection.name
        self._transposed, self._dtype = projection.transposed, np.dtype(projection.weight.dtype)
        weight = projection.weight
        if not can_evaluate(weight):
            raise InputError(f"{self._name}: its weight is computed in a way that isn't known here; keep it wide")
        self.source = weight._values if isinstance(weight, gs.Constant) else Expression(weight)
        with named(self._name):
            grid.scale_shape(self.shape)
        self.experts = self._by_expert(weight) if len(weight.shape) > 2 and grid.per == "channel" else []

    def _by_expert(self, weight: gs.Tensor) -> list[Rounding]:
        cast = producer(weight, "Cast")
        stored = weight if cast is None else cast.inputs[0]
        if not isinstance(stored, gs.Constant):
            return []
        found = []
        for expert in range(int(weight.shape[0])):
            one = copy.copy(self)
            one.source, one.experts = row(stored._values, expert), []
            one.shape = (self.shape[0] // int(weight.shape[0]), self.shape[1])
            found.append(one)
        return found

    def scales(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scale and zero point alone, in half the time."""
        return self._scales(self._rows())

    def rounded(self) -> Rounded:
        rows = self._rows()
        with named(self._name):
            return self.grid.quantize(rows, *self._scales(rows))

    def _scales(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        with named(self._name):
            scale, zero = self.grid.scales(rows)
        return narrow_scale(scale, self._dtype).astype(np.float32), zero  # weights are rounded with what is stored

    def _rows(self) -> np.ndarray:
        return rows_of(loaded(self.source), self._transposed)


@contextmanager
def named(name: str) -> Iterator[None]:
    """An InputError from inside says which projection it is about."""
    try:
        yield
    except InputError as problem:
        raise InputError(f"{name}: {problem}") from problem
