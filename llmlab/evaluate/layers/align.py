"""Two engines of one model beside each other: layers that compute the same nodes of the serving graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmlab.evaluate.layers.model import CompiledLayer, EngineLayers, Row, microseconds
from llmlab.graph.disjoint import DisjointSets

SAME = 0.05
"""Times that differ by less than this share of the longer one are called the same."""


@dataclass(frozen=True)
class Pair:
    """The fewest layers of two engines that compute the same serving nodes; several where they were fused in different ways."""

    first: tuple[CompiledLayer, ...]
    second: tuple[CompiledLayer, ...]

    @property
    def name(self) -> str:
        return self._main.name

    @property
    def kind(self) -> str:
        return self._main.kind

    @property
    def block(self) -> str:
        return self._main.block

    @property
    def alike(self) -> tuple[object, ...]:
        """The same for pairs that differ in the number of their transformer layer alone."""
        return tuple(
            tuple((layer.alike, layer.kind, layer.dtype, layer.kernels, tuple(layer.flops.values())) for layer in side)
            for side in (self.first, self.second)
        )

    @property
    def _main(self) -> CompiledLayer:
        return max((*self.first, *self.second), key=lambda layer: max(layer.seconds.values(), default=0.0))


@dataclass(frozen=True)
class PairRow:
    """Pairs that are alike."""

    name: str
    pairs: tuple[Pair, ...]

    @property
    def kind(self) -> str:
        return self.pairs[0].kind

    def layers(self, side: int) -> list[CompiledLayer]:
        return [layer for pair in self.pairs for layer in (pair.first, pair.second)[side]]

    def dtype(self, side: int) -> str:
        """Precisions of one engine here, most important first."""
        found = (self.pairs[0].first, self.pairs[0].second)[side]
        products = [layer for layer in found if layer.kind in ("product", "experts", "attention")]
        return ", ".join(dict.fromkeys(layer.dtype for layer in products or found))

    def seconds(self, side: int, phase: str) -> float | None:
        """Of all of them in one step."""
        times = [layer.seconds[phase] for layer in self.layers(side) if phase in layer.seconds]
        return sum(times) if times else None

    def verdict(self, phase: str) -> tuple[str, str]:
        """(`won`, `lost`, `same` or empty, and a text) for the second engine against the first."""
        one, two = self.seconds(0, phase), self.seconds(1, phase)
        if one is None or two is None:
            return "", "only in one" if one is not two else ""
        if abs(one - two) <= SAME * max(one, two):
            return "same", "same"
        word = "won" if two < one else "lost"
        return word, f"{word} {microseconds(abs(one - two))} ({max(one, two) / min(one, two):.1f}×)"


@dataclass(frozen=True)
class Alignment:
    """Two engines of one model."""

    engines: tuple[EngineLayers, EngineLayers]
    pairs: tuple[Pair, ...]

    def rows(self, keep: Callable[[Pair], bool] | None = None) -> list[PairRow]:
        """Pairs that are alike as one, in running order."""
        found: dict[tuple[object, ...], list[Pair]] = {}
        for pair in self.pairs:
            if keep is None or keep(pair):
                found.setdefault(pair.alike, []).append(pair)
        return [PairRow(_named(pairs), tuple(pairs)) for pairs in found.values()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "engines": [engine.to_dict() for engine in self.engines],
            "pairs": [
                {"name": p.name, "first": [x.name for x in p.first], "second": [x.name for x in p.second]}
                for p in self.pairs
            ],
        }


def align(first: EngineLayers, second: EngineLayers, phase: str = "decode") -> Alignment:
    """Layers of a phase that share nodes of the serving graph belong together, and so do those that share nodes with these.

    What a compiler added of its own has no partner.
    """
    sides = [[layer for layer in engine.layers if phase in layer.phases] for engine in (first, second)]
    sets = DisjointSets()
    for side, layers in enumerate(sides):
        for number, layer in enumerate(layers):
            for node in layer.nodes:
                sets.join((side, number), node)
    groups: dict[Any, tuple[list[CompiledLayer], list[CompiledLayer]]] = {}
    for side, layers in enumerate(sides):
        for number, layer in enumerate(layers):
            groups.setdefault(sets.find((side, number)), ([], []))[side].append(layer)
    return Alignment((first, second), tuple(Pair(tuple(one), tuple(two)) for one, two in groups.values()))


def _named(pairs: Iterable[Pair]) -> str:
    """The name that a row of these pairs' longest layers would have, and what else is in them."""
    mains = [pair._main for pair in pairs]
    others = dict.fromkeys(layer.kind for pair in pairs for layer in (*pair.first, *pair.second))
    more = [kind for kind in others if kind != mains[0].kind]
    return Row.of(mains).name + (f" with {', '.join(more)}" if more else "")
