"""`llmlab.search`: a precision for each product, so that the whole stays within a limit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.errors import InputError
from llmlab.evaluate.heatmap import Cell, grid
from llmlab.evaluate.knapsack import Assignment, Choice, front
from llmlab.evaluate.laboratory import Laboratory, Measured
from llmlab.evaluate.limits import Limit, checked
from llmlab.evaluate.samples import Data
from llmlab.evaluate.sensitivity import Unit, alone, sense, units
from llmlab.graph.graph import Graph
from llmlab.graph.reports.render import as_text, html_table, plain
from llmlab.progress import make_bar
from llmlab.quant.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

METHOD = (
    "multiple-choice knapsack over KL measured product by product, which is taken to add up; then built and measured"
)
_WIDE = "wide"
_TRIES = 8
"""Engines that are built and measured on the way to a limit."""


@dataclass(frozen=True)
class SearchResult:
    """What `llmlab.search` found: a recipe, what it was expected to be like, and what it is like."""

    recipe: Recipe
    """For `llmlab.quantize`, with the calibration that the search had."""
    limit: str
    """Such as `max_bytes=12000000`."""
    predicted_kl: float
    """Sum of what its products cost one by one."""
    predicted_bytes: int
    measured: Measured
    wide_bytes: int
    """Of an engine of the graph as it is."""
    chosen: tuple[tuple[int | None, str, str], ...]
    """(layer, role, recipe's name) of each product; `wide` where it stays as it is."""
    uniform: dict[str, Measured]
    """The candidates, each for all products."""
    front: tuple[tuple[float, int], ...]
    """(KL, bytes) of the engines that the estimates say are worth building."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "search",
            "method": METHOD,
            "limit": self.limit,
            "recipe": self.recipe.to_dict(),
            "predicted": {"kl": self.predicted_kl, "size_bytes": self.predicted_bytes},
            "measured": self.measured.to_dict(),
            "wide_bytes": self.wide_bytes,
            "chosen": [list(entry) for entry in self.chosen],
            "uniform": {name: found.to_dict() for name, found in self.uniform.items()},
            "front": [list(point) for point in self.front],
        }

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """(name, KL, top-1, size): what was found, its prediction, the uniform recipes, nothing at all."""

        def row(name: str, m: Measured) -> tuple[str, str, str, str]:
            return name, m.kl.show(".2g"), m.top1.show(".1%"), f"{m.size_bytes / 1e6:,.2f} MB"

        predicted = ("predicted", f"{self.predicted_kl:.2g}", "", f"{self.predicted_bytes / 1e6:,.2f} MB")
        others = [row(f"{name} everywhere", m) for name, m in self.uniform.items()]
        return [row("found", self.measured), predicted, *others, (_WIDE, "0", "", f"{self.wide_bytes / 1e6:,.2f} MB")]

    @property
    def _title(self) -> str:
        counts = Counter(name for _, _, name in self.chosen)
        return f"{self.limit}: {', '.join(f'{n} products {name}' for name, n in counts.most_common())}"

    def _grid(self) -> tuple[list[str], list[list[str]]]:
        cells, layers, roles = grid([Cell(layer, role, 0.0, name) for layer, role, name in self.chosen])
        texts = [[cells[at, role].text if (at, role) in cells else "" for role in roles] for at in layers]
        return ["layer", *roles], [[layer, *row] for layer, row in zip(layers, texts, strict=True)]

    def __str__(self) -> str:
        return as_text(self.__rich__(), 100)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table

        numbers = Table(title=plain(self._title), box=box.SIMPLE_HEAD, title_justify="left")
        for head in ("", "KL, nats a token", "top-1", "size"):
            numbers.add_column(head, justify="left" if not head else "right")
        for row in self._rows():
            numbers.add_row(*map(plain, row))
        heads, rows = self._grid()
        choices = Table(box=box.SIMPLE_HEAD)
        for head in heads:
            choices.add_column(plain(head))
        for cells in rows:
            choices.add_row(*map(plain, cells))
        return Group(numbers, choices, plain(METHOD, "dim"))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from html import escape

        numbers = html_table(("", "KL, nats a token", "top-1", "size"), [map(escape, row) for row in self._rows()])
        heads, rows = self._grid()
        choices = html_table(map(escape, heads), [map(escape, row) for row in rows])
        page = f"<div><div><b>{escape(self._title)}</b></div>{numbers}{choices}<div><small>{METHOD}</small></div></div>"
        return {"text/plain": str(self), "text/html": page}


def search(
    graph: Graph,
    candidates: Sequence[str | Path | Mapping[str, Any] | Recipe],
    data: Data | None = None,
    *,
    max_kl: float | None = None,
    max_bytes: int | None = None,
    min_top1: float | None = None,
    calibration: Any = None,
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    threads: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> SearchResult:
    """Choose one of the candidates, or none, for each product, so that the engine stays within a limit.

    max_bytes: of the engine folder's files: the least KL within it. max_kl: of the KL divergence from the graph as it is, in
    nats a token, and min_top1: of the share of tokens with the same most likely one: the fewest bytes within it. One of the three.
    candidates: recipes that quantize projections. All else is as for `llmlab.sensitivity`.

    Each candidate is measured on each product alone; these KLs are taken to add up, and a multiple-choice knapsack gives
    all assignments worth building. Some are built and measured, until one is as near to the limit as they come; where
    a candidate everywhere is better than that, it is the answer. What is multiplied at once (q, k and v) gets one precision.
    Raises InputError for a limit that none of them keeps.
    """
    recipes = checked(candidates, max_kl=max_kl, max_bytes=max_bytes, min_top1=min_top1)
    with Laboratory(
        graph, data, calibration=calibration, samples=samples, length=length, seed=seed, threads=threads, cache=cache
    ) as laboratory:
        table = _Table(laboratory, recipes, progress)
        limit = Limit(max_kl, max_bytes, min_top1)
        bar, remove = make_bar(_TRIES, desc=f"within {limit}") if progress else (None, None)
        try:
            place, measured = _approach(table, limit, bar)
        finally:
            if remove is not None:
                remove()
        for name, found in table.uniform.items():
            if limit.keeps(found) and limit.better(found, measured):
                return table.result(table.everywhere(name), limit, found)
        return table.result(table.front[place], limit, measured)


class _Table:
    """What every choice costs alone, the candidates everywhere, and the assignments that are worth building."""

    def __init__(self, laboratory: Laboratory, recipes: Mapping[str, Recipe], progress: bool) -> None:
        self.laboratory = laboratory
        self.names = [_WIDE, *recipes]
        self._units: dict[str, dict[str, Unit]] = {}  # by node, then by recipe
        costs: dict[str, dict[str, Choice]] = {}
        self.uniform: dict[str, Measured] = {}
        for name, recipe in recipes.items():
            found = units(laboratory.graph, recipe, "product")
            sensed = sense(laboratory, recipe, by="product", progress=progress)
            for unit, row in zip(found, sensed.rows, strict=True):
                self._units.setdefault(unit.node, {})[name] = unit
                costs.setdefault(unit.node, {})[name] = Choice(row.kl.value, row.saved_bytes)
            self.uniform[name] = laboratory.measure(alone(recipe, [o for unit in found for o in unit.overrides]))
        never = Choice(math.inf, 0)
        self.options = [[Choice(0.0, 0), *(row.get(n, never) for n in self.names[1:])] for row in costs.values()]
        self.front = front(self.options)
        if any(self.front[0].picks):  # something costs nothing
            self.front.insert(0, Assignment((0,) * len(self.options), 0.0, 0))

    def everywhere(self, name: str) -> Assignment:
        index = self.names.index(name)
        picks = tuple(index if name in row else 0 for row in self._units.values())
        chosen = [unit[pick] for unit, pick in zip(self.options, picks, strict=True)]
        return Assignment(picks, sum(c.cost for c in chosen), sum(c.saved for c in chosen))

    def recipe(self, assignment: Assignment) -> Recipe:
        overrides = [
            override
            for pick, row in zip(assignment.picks, self._units.values(), strict=True)
            if pick
            for override in row[self.names[pick]].overrides
        ]
        return Recipe(layers=tuple(overrides), name="searched")

    def measure(self, place: int) -> Measured:
        """The assignment at a place of the front; one that quantizes nothing is not built."""
        assignment = self.front[place]
        if any(assignment.picks):
            return self.laboratory.measure(self.recipe(assignment))
        return self.laboratory.nothing

    def result(self, assignment: Assignment, limit: Limit, measured: Measured) -> SearchResult:
        wide = self.laboratory.wide.size
        chosen = []
        for pick, row in zip(assignment.picks, self._units.values(), strict=True):
            unit = next(iter(row.values()))
            chosen.append((unit.layer, unit.role, self.names[pick]))
        return SearchResult(
            self.recipe(assignment),
            str(limit),
            assignment.cost,
            wide - assignment.saved,
            measured,
            wide,
            tuple(chosen),
            self.uniform,
            tuple((a.cost, wide - a.saved) for a in self.front),
        )


def _approach(table: _Table, limit: Limit, bar: Any) -> tuple[int, Measured]:
    """The last place of the front, or with a limit of bytes the first, whose engine keeps the limit: (place, measured)."""
    wide, places = table.laboratory.wide.size, len(table.front)
    if limit.max_bytes is not None:
        place = next((i for i, a in enumerate(table.front) if wide - a.saved <= limit.max_bytes), places - 1)
        for _ in range(_TRIES):
            found = table.measure(place)
            if bar is not None:
                bar.update(1)
            if limit.keeps(found) or place == places - 1:
                break
            over = found.size_bytes - limit.max_bytes  # estimates add up to a little less than what is saved, or more
            wanted = table.front[place].saved + over
            place = next((i for i in range(place + 1, places) if table.front[i].saved >= wanted), places - 1)
        if limit.keeps(found):
            return place, found
        raise InputError(
            f"max_bytes is {limit.max_bytes:,}; the smallest engine of these candidates has {found.size_bytes:,}: "
            "allow more, or give candidates of fewer bits"
        )
    kept, best, broken = 0, table.laboratory.nothing, places
    factor = 1.0  # by which what is measured is more than the sum of the parts
    for _ in range(_TRIES):
        if broken - kept < 2:
            break
        place = (kept + broken) // 2
        if limit.max_kl is not None:
            fits = [i for i in range(kept + 1, broken) if table.front[i].cost * factor <= limit.max_kl]
            place = fits[-1] if fits else kept + 1
        found = table.measure(place)
        if bar is not None:
            bar.update(1)
        if table.front[place].cost > 0 and found.kl.value > 0:
            factor = found.kl.value / table.front[place].cost
        if limit.keeps(found):
            kept, best = place, found
        else:
            broken = place
    return kept, best
