"""Observers: what is kept of an activation while calibration streams past. Memory doesn't depend on how many rows there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmlab.quant.statistics import Statistics, grams

SAMPLE = 512
"""Rows that a `Rows` keeps."""
_PART = 1 << 22  # numbers whose magnitudes are in memory at once


class Observer(Protocol):
    """Takes in the rows of one tensor, some at a time."""

    def add(self, rows: np.ndarray) -> None:
        """rows [R, K]: all that comes with it is finite."""


class AbsMax:
    """The largest magnitude of each channel: `absmax` [K], None before the first row."""

    absmax: NDArray[np.float32] | None = None

    def add(self, rows: np.ndarray) -> None:
        for part in _parts(rows):
            most = np.abs(part).max(0).astype(np.float32)
            self.absmax = most if self.absmax is None else np.maximum(self.absmax, most)


class MeanAbs:
    """The mean magnitude of each channel: `meanabs` [K], None before the first row."""

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        for part in _parts(rows):
            total = np.abs(part).sum(0, dtype=np.float64)
            self._sum = total if self._sum is None else self._sum + total
            self._count += len(part)

    @property
    def meanabs(self) -> NDArray[np.float32] | None:
        return None if self._sum is None else (self._sum / self._count).astype(np.float32)


class Gram:
    """XᵀX over the number of rows: `gram` float32 [K, K], None before the first row. Takes 2 · K² · 4 bytes while it adds."""

    def __init__(self) -> None:
        self._sum: NDArray[np.float32] | None = None
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        wide = np.ascontiguousarray(rows, np.float32)
        product = wide.T @ wide
        if self._sum is None:
            self._sum = product
        else:
            self._sum += product
        self._count += len(rows)

    @property
    def gram(self) -> NDArray[np.float32] | None:
        return None if self._sum is None else self._sum / np.float32(self._count)


class Blocks:
    """What of XᵀX over the number of rows lies within groups of columns: `blocks` float32 [K / group, group, group], None before the
    first row. Takes K · group · 4 bytes."""

    def __init__(self, group: int) -> None:
        self.group = group
        self._sum: NDArray[np.float32] | None = None
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        for part in _parts(rows):
            product = grams(part, self.group)
            self._sum = product if self._sum is None else self._sum + product
            self._count += len(part)

    @property
    def blocks(self) -> NDArray[np.float32] | None:
        return None if self._sum is None else self._sum / np.float32(self._count)


class Rows:
    """`sample` [≤ limit, K]: rows chosen at random, each as likely as any other; the same ones for the same seed.

    Every row draws a number when it comes, and those with the least stay: in which parts the rows come makes no difference.
    """

    def __init__(self, limit: int = SAMPLE, seed: int = 0) -> None:
        self._limit = limit
        self._random = np.random.default_rng(seed)
        self._keys = np.zeros(0)
        self.sample: NDArray[np.float32] | None = None

    def add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        keys = self._random.random(len(rows))
        fresh = np.flatnonzero(keys < (self._keys.max() if len(self._keys) == self._limit else 2))
        own = rows[fresh].astype(np.float32)
        sample = own if self.sample is None else np.concatenate([self.sample, own])
        every = np.concatenate([self._keys, keys[fresh]])
        kept = np.sort(np.argsort(every, kind="stable")[: self._limit])
        self._keys, self.sample = every[kept], sample[kept]


class StatisticsOf:
    """Several observers of one tensor in one. wanted: of `absmax`, `meanabs`, `sample`, `gram`, and `blocks/64`, with any group size."""

    def __init__(self, wanted: frozenset[str], *, rows: int = SAMPLE, seed: int = 0) -> None:
        made: dict[str, Callable[[], Observer]] = {
            "absmax": AbsMax,
            "meanabs": MeanAbs,
            "gram": Gram,
            "sample": lambda: Rows(rows, seed),
        }
        self._observers = {name: made[name]() for name in sorted(wanted) if name in made}
        self._blocks = [Blocks(int(name.removeprefix("blocks/"))) for name in sorted(wanted - made.keys())]
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        self._count += len(rows)
        for observer in (*self._observers.values(), *self._blocks):
            observer.add(rows)

    def statistics(self) -> Statistics:
        seen = {name: getattr(o, name) for name, o in self._observers.items()}
        blocks = {o.group: found for o in self._blocks if (found := o.blocks) is not None}
        return Statistics(self._count, **seen, blocks=blocks)


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    step = max(1, _PART // max(1, rows.shape[-1]))
    return [rows[i : i + step] for i in range(0, len(rows), step)]
