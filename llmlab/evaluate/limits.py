"""What `llmlab.search` is asked for: a limit that the engine keeps, and recipes to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.errors import InputError
from llmlab.evaluate.laboratory import Measured
from llmlab.quant.recipe import Recipe


@dataclass(frozen=True)
class Limit:
    """One of the three is given."""

    max_kl: float | None
    max_bytes: int | None
    min_top1: float | None

    def __str__(self) -> str:
        return next(f"{name}={value}" for name, value in vars(self).items() if value is not None)

    def keeps(self, found: Measured) -> bool:
        if self.max_bytes is not None:
            return found.size_bytes <= self.max_bytes
        if self.max_kl is not None:
            return found.kl.value <= self.max_kl
        assert self.min_top1 is not None
        return found.top1.value >= self.min_top1

    def better(self, one: Measured, other: Measured) -> bool:
        if self.max_bytes is not None:
            return one.kl.value < other.kl.value
        return one.size_bytes < other.size_bytes


def checked(candidates: Sequence[str | Path | Mapping[str, Any] | Recipe], **limits: float | None) -> dict[str, Recipe]:
    """The candidates by name. Raises InputError for what can't be searched over, or a limit that is none."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise InputError("give one limit: max_kl, max_bytes or min_top1")
    [(name, value)] = given.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf or (name == "min_top1" and value > 1):
        wanted = "a share of at most 1" if name == "min_top1" else "a number above 0"
        raise InputError(f"{name} is {value!r}, expected {wanted}")
    if isinstance(candidates, (str, Path, Mapping, Recipe)) or not candidates:
        raise InputError("expected a list of recipes to choose from, at least one")
    recipes: dict[str, Recipe] = {}
    for candidate in candidates:
        recipe = Recipe.parse(candidate)
        label = recipe.name or str(recipe)
        if recipe.kv_cache is not None or recipe.precision is not None:
            raise InputError(
                f"{label}: a KV cache's precision and the graph's own are not chosen product by product: "
                "convert the graph first, and add kv_cache to the recipe that is found"
            )
        if label in recipes:
            raise InputError(f"two candidates are called {label}: give each a name of its own")
        recipes[label] = recipe
    return recipes
