"""A choice of precisions: what each part gets, what that is expected to cost, and the best choice within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.errors import InputError
from llmlab.evaluate.knapsack import Assignment, Choice, front
from llmlab.evaluate.sensitivity import Sensed, Sensitivity
from llmlab.quant.recipe import Recipe

WIDE = "wide"
_NEVER = Choice(math.inf, 0)


@dataclass(frozen=True)
class Part:
    """Projections that get one precision: a cell of the map."""

    projections: tuple[str, ...]
    layer: int | None
    role: str

    @property
    def key(self) -> str:
        return " ".join(self.projections)


class Mix:
    """One precision for each part: `wide` or one of the recipes that sensitivities were measured for.

    Costs of parts are taken to add up, as `llmlab.search` takes them to. A part that was put by hand is kept when a budget
    chooses for the others.
    """

    def __init__(self, sensitivities: Sequence[Sensitivity]) -> None:
        """Raises InputError where there are none, two are for one recipe, or they are of different graphs."""
        self.recipes = [found.recipe for found in sensitivities]
        if not sensitivities or len(set(self.recipes)) < len(self.recipes) or WIDE in self.recipes:
            raise InputError(f"sensitivities are for {self.recipes}, expected one or several, each for another recipe")
        sizes = {found.wide_bytes for found in sensitivities}
        if len(sizes) > 1:
            raise InputError("these sensitivities are of engines of different sizes: measure them on one graph")
        self.wide_bytes = sizes.pop()
        self.names = [WIDE, *self.recipes]
        rows: dict[tuple[str, ...], dict[str, Sensed]] = {}
        for found in sensitivities:
            for row in found.rows:
                rows.setdefault(row.projections, {})[found.recipe] = row
        self._rows = list(rows.values())
        taken = [name for projections in rows for name in projections]
        if len(set(taken)) < len(taken):
            raise InputError(
                "these sensitivities group projections differently: measure all by product, or all by projection"
            )
        self.parts = [Part(key, *self._place(row)) for key, row in rows.items()]
        self.options = [[Choice(0.0, 0), *(self._choice(row.get(name)) for name in self.recipes)] for row in self._rows]
        self.picks = [0] * len(self.parts)
        self.by_hand: set[int] = set()
        self._front: list[Assignment] | None = None

    @staticmethod
    def _place(row: dict[str, Sensed]) -> tuple[int | None, str]:
        first = next(iter(row.values()))
        return first.layer, first.role

    @staticmethod
    def _choice(row: Sensed | None) -> Choice:
        return _NEVER if row is None else Choice(row.kl.value, row.saved_bytes)

    @property
    def kl(self) -> float:
        """Expected KL divergence in nats a token: the sum of the parts'."""
        return sum(self.options[i][pick].cost for i, pick in enumerate(self.picks))

    @property
    def size(self) -> int:
        """Expected bytes of the engine."""
        return self.wide_bytes - sum(self.options[i][pick].saved for i, pick in enumerate(self.picks))

    @property
    def front(self) -> list[Assignment]:
        """Choices that none beats in KL and bytes, from the largest engine to the smallest, with what was put by hand kept."""
        if self._front is None:
            options = [[unit[self.picks[i]]] if i in self.by_hand else unit for i, unit in enumerate(self.options)]
            found = front(options)
            self._front = [
                Assignment(
                    tuple(self.picks[i] if i in self.by_hand else p for i, p in enumerate(a.picks)), a.cost, a.saved
                )
                for a in found
            ]
        return self._front

    @property
    def smallest(self) -> int:
        """Bytes of the smallest engine that can be had."""
        return self.wide_bytes - self.front[-1].saved

    def everywhere(self, name: str) -> tuple[float, int]:
        """(KL, bytes) with one recipe for all parts that it has."""
        index = self.names.index(name)
        chosen = [unit[index] for unit in self.options if unit[index] is not _NEVER]
        return sum(c.cost for c in chosen), self.wide_bytes - sum(c.saved for c in chosen)

    def fit(self, most_bytes: int) -> bool:
        """Take the choice of least KL within `most_bytes`; the smallest where none is, and False."""
        fits = next((a for a in self.front if self.wide_bytes - a.saved <= most_bytes), None)
        self.picks = list((fits or self.front[-1]).picks)
        return fits is not None

    def put(self, part: int, name: str) -> None:
        """Give one part a precision by hand. Raises InputError where it wasn't measured with that."""
        index = self.names.index(name)
        if self.options[part][index] is _NEVER:
            raise InputError(f"{self.parts[part].key} was not measured with {name}: choose another precision for it")
        self.picks[part] = index
        self.by_hand.add(part)
        self._front = None

    def release(self, part: int) -> None:
        """Let the budget choose for a part again."""
        self.by_hand.discard(part)
        self._front = None

    def chosen(self, part: int) -> str:
        return self.names[self.picks[part]]

    def sensed(self, part: int, name: str) -> Sensed | None:
        """What was measured for a part with a recipe; None for `wide`, and where nothing was."""
        return self._rows[part].get(name)

    def recipe(self) -> Recipe:
        """The choice, for `llmlab.quantize`. Raises InputError where all is wide."""
        overrides = [
            o for i in range(len(self.parts)) if (row := self.sensed(i, self.chosen(i))) for o in row.overrides
        ]
        if not overrides:
            raise InputError("every part is wide, so there is nothing to quantize: choose a precision for one")
        return Recipe(layers=tuple(overrides), name="explored")

    def to_dict(self) -> dict[str, Any]:
        parts = [
            {
                **vars(part),
                "projections": list(part.projections),
                "chosen": self.chosen(i),
                "by_hand": i in self.by_hand,
            }
            for i, part in enumerate(self.parts)
        ]
        return {"kl": self.kl, "size_bytes": self.size, "wide_bytes": self.wide_bytes, "parts": parts}
