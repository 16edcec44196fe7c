"""Arrays made of other arrays, computed when they are written: a stack of memory maps never lies in memory beside its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmlab.graph.store.deferred import DeferredValues

Values = np.ndarray | DeferredValues
"""What a constant may hold: an array (mostly a memory map), or one that is computed when it is asked for."""


class LazyArray(DeferredValues):
    """Computed by writing into a buffer that is given, so that nested ones need no memory but the result's."""

    def load(self) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.fill(out)
        return out

    def fill(self, out: np.ndarray) -> None:
        """Write the values into `out`, a view of any strides."""
        raise NotImplementedError(f"{type(self).__name__} computes nothing")


def _fill(out: np.ndarray, values: Values) -> None:
    if isinstance(values, LazyArray):
        values.fill(out)
    else:
        out[...] = values.load() if isinstance(values, DeferredValues) else values


class Stacked(LazyArray):
    """Arrays of one shape along a new axis. Raises ValueError where the shapes differ."""

    def __init__(self, parts: Sequence[Values], axis: int = 0) -> None:
        shapes = {tuple(p.shape) for p in parts}
        if len(shapes) != 1:
            raise ValueError(f"parts of the shapes {', '.join(str(list(s)) for s in sorted(shapes))} can't be stacked")
        (shape,) = shapes
        self.parts = self.sources = list(parts)
        self.axis = axis % (len(shape) + 1)
        super().__init__((*shape[: self.axis], len(parts), *shape[self.axis :]), np.result_type(*_dtypes(parts)))

    def fill(self, out: np.ndarray) -> None:
        for target, part in zip(np.moveaxis(out, self.axis, 0), self.parts, strict=True):
            _fill(target, part)


class Joined(LazyArray):
    """Arrays one after another along an axis. Raises ValueError where the other axes differ."""

    def __init__(self, parts: Sequence[Values], axis: int = 0) -> None:
        first = tuple(parts[0].shape)
        self.parts = self.sources = list(parts)
        self.axis = axis % len(first)
        self.sizes = [int(p.shape[self.axis]) if len(p.shape) == len(first) else -1 for p in parts]
        for part in parts:
            if (
                len(part.shape) != len(first)
                or np.delete(part.shape, self.axis).tolist() != np.delete(first, self.axis).tolist()
            ):
                raise ValueError(f"{list(first)} and {list(part.shape)} can't be joined along axis {self.axis}")
        shape = (*first[: self.axis], sum(self.sizes), *first[self.axis + 1 :])
        super().__init__(shape, np.result_type(*_dtypes(parts)))

    def fill(self, out: np.ndarray) -> None:
        ends = np.cumsum(self.sizes)
        targets = np.split(out, ends[:-1], self.axis)
        for target, part in zip(targets, self.parts, strict=True):
            _fill(target, part)


class Rearranged(LazyArray):
    """A view of another array (part of it, its axes swapped or split and joined), of a shape known beforehand."""

    def __init__(self, source: Values, arrange: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> None:
        super().__init__(tuple(int(d) for d in shape), np.dtype(source.dtype))
        self.source, self.arrange, self.sources = source, arrange, [source]

    def fill(self, out: np.ndarray) -> None:
        source = self.source
        out[...] = self.arrange(source.load() if isinstance(source, DeferredValues) else source)


def part(source: Values, axis: int, begin: int, end: int) -> Rearranged:
    """Rows `begin` to `end` of `source` along `axis`."""
    index = (slice(None),) * (axis % len(source.shape)) + (slice(begin, end),)
    shape = [end - begin if i == axis % len(source.shape) else d for i, d in enumerate(source.shape)]
    return Rearranged(source, lambda array: array[index], shape)


def swapped(source: Values, first: int, second: int) -> Rearranged:
    """`source` with two axes swapped."""
    shape = list(source.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return Rearranged(source, lambda array: np.swapaxes(array, first, second), shape)


def dealt(source: Values, axis: int, groups: int) -> Rearranged:
    """`source` with axis `axis`, groups · n long, dealt out: element g of every n comes before element g + 1 of any.

    With `groups` = 2, 0 1 2 3 4 5 becomes 0 2 4 1 3 5: what a model with neighbouring pairs has to one with halves.
    """
    shape, axis = tuple(source.shape), axis % len(source.shape)
    split = (*shape[:axis], shape[axis] // groups, groups, *shape[axis + 1 :])
    return Rearranged(source, lambda array: np.swapaxes(array.reshape(split), axis, axis + 1).reshape(shape), shape)


def row(source: Values, index: int) -> Values:
    """`source[index]`; where `source` was put together along other axes or stacked, without computing the rest of it."""
    if isinstance(source, np.ndarray):
        return source[index]
    if isinstance(source, Stacked) and source.axis == 0:
        return source.parts[index]
    if isinstance(source, Joined) and source.axis > 0:
        return Joined([row(p, index) for p in source.parts], source.axis - 1)
    return Rearranged(source, lambda array: array[index], source.shape[1:])


def _dtypes(parts: Sequence[Values]) -> list[np.dtype]:
    return [np.dtype(p.dtype) for p in parts]
