"""`llmlab.sensitivity`: what quantizing one projection alone costs, for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmlab.errors import InputError
from llmlab.evaluate.heatmap import Cell, heat_map, table
from llmlab.evaluate.laboratory import Laboratory
from llmlab.evaluate.metrics import Estimate
from llmlab.evaluate.samples import Data
from llmlab.graph.graph import Graph
from llmlab.graph.reports.render import as_text
from llmlab.progress import make_bar
from llmlab.quant.projections import matches, select
from llmlab.quant.quantize import plan
from llmlab.quant.recipe import Recipe
from llmlab.quant.scheme import Override

if TYPE_CHECKING:
    from rich.console import RenderableType

By = Literal["projection", "product"]


@dataclass(frozen=True)
class Unit:
    """Projections that are quantized together: one, or all that one product multiplies by."""

    overrides: tuple[Override, ...]
    """Of each of them, by its name."""
    layer: int | None
    role: str
    """`q`, or of a product `q k v`."""
    node: str
    """Name of the node that multiplies by them."""

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(o.pattern for o in self.overrides)


@dataclass(frozen=True)
class Sensed:
    """What quantizing one unit alone does."""

    projections: tuple[str, ...]
    layer: int | None
    role: str
    kl: Estimate
    """KL divergence from the graph as it is, in nats a token."""
    saved_bytes: int
    """By which the engine is smaller."""
    overrides: tuple[Override, ...] = ()
    """What was done to each of the projections, for a recipe's `layers`."""

    def to_dict(self) -> dict[str, Any]:
        facts = {key: value for key, value in vars(self).items() if key != "overrides"}
        return {**facts, "projections": list(self.projections), "kl": self.kl.to_dict()}


@dataclass(frozen=True)
class Sensitivity:
    """What each projection costs alone, in the graph's order. Shows itself as layers × roles."""

    recipe: str
    rows: tuple[Sensed, ...]
    together: Estimate | None = None
    """KL with all of them quantized at once."""
    wide_bytes: int = 0
    """Of an engine of the graph as it is."""

    @property
    def sum(self) -> float:
        """Of the rows' KL: what all at once would cost if errors only added up."""
        return float(sum(row.kl.value for row in self.rows))

    def worst(self, count: int = 5) -> list[Sensed]:
        """The rows that cost most."""
        return sorted(self.rows, key=lambda row: -row.kl.value)[:count]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "sensitivity",
            "recipe": self.recipe,
            "rows": [row.to_dict() for row in self.rows],
            "sum": self.sum,
            "together": None if self.together is None else self.together.to_dict(),
        }

    @property
    def _title(self) -> str:
        return f"{self.recipe}: KL of each projection quantized alone, nats a token"

    @property
    def _note(self) -> str:
        together = "" if self.together is None else f"; all at once {self.together.show('.2g')}"
        return f"sum {self.sum:.2g}{together}"

    @property
    def _cells(self) -> list[Cell]:
        return [
            Cell(row.layer, row.role, row.kl.value, f"{', '.join(row.projections)}: {row.kl.show('.2g')}")
            for row in self.rows
        ]

    def __str__(self) -> str:
        return as_text(self.__rich__(), 100)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        return table(self._cells, self._title, self._note)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": heat_map(self._cells, self._title, self._note)}


def sensitivity(
    graph: Graph,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    data: Data | None = None,
    *,
    calibration: Any = None,
    pattern: str = "*",
    by: By = "projection",
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    threads: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """For each projection: the KL divergence that quantizing it alone costs.

    An engine is built for each, with this projection quantized and all else as it is, and runs on the data, so it takes as
    many builds as there are projections; on ONNX Runtime. Measurements are kept: after an interruption, or with
    another `pattern`, those that there are aren't repeated.

    recipe: what is done to a projection (see `llmlab.quantize`). calibration: for recipes that need one. pattern: which
    projections, by name or role. by: `projection`, or `product`: those that are multiplied at once (q, k and v) count as one.
    cache: the folder of measurements. All else is as for `llmlab.evaluate`.
    Raises InputError for a recipe that quantizes no projection, or a pattern that matches none.
    """
    recipe = Recipe.parse(recipe)
    with Laboratory(
        graph,
        data,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        threads=threads,
        cache=cache,
    ) as laboratory:
        return sense(laboratory, recipe, by=by, pattern=pattern, progress=progress)


def sense(
    laboratory: Laboratory, recipe: Recipe, *, by: By, pattern: str = "*", together: bool = True, progress: bool = True
) -> Sensitivity:
    """`sensitivity`, in a laboratory that is open. together: also measure all of them at once."""
    found = units(laboratory.graph, recipe, by, pattern)
    name = recipe.name or str(recipe)
    bar, remove = make_bar(len(found) + together, desc=f"sensitivity to {name}") if progress else (None, None)
    rows = []
    try:
        for unit in found:
            one = laboratory.measure(alone(recipe, unit.overrides))
            saved = laboratory.wide.size - one.size_bytes
            rows.append(Sensed(unit.projections, unit.layer, unit.role, one.kl, saved, unit.overrides))
            if bar is not None:
                bar.update(1)
        whole = alone(recipe, [o for unit in found for o in unit.overrides])
        total = laboratory.measure(whole).kl if together else None
    finally:
        if remove is not None:
            remove()
    return Sensitivity(name, tuple(rows), total, laboratory.wide.size)


def units(graph: Graph, recipe: Recipe, by: By = "projection", pattern: str = "*") -> list[Unit]:
    """What the recipe quantizes, in the graph's order, one projection or one product at a time."""
    if by not in ("projection", "product"):
        raise InputError(f"by is {by!r}, expected projection or product")
    jobs = [job for job in plan(graph, recipe) if job.weights is not None or job.activations is not None]
    if not jobs:
        raise InputError(
            f"{recipe.name or 'this recipe'} quantizes no projection: name one with weights or activations"
        )
    select([job.projection for job in jobs], pattern)
    groups: dict[object, list[Any]] = {}
    for job in jobs:
        if matches(job.projection, pattern):
            groups.setdefault(job.name if by == "projection" else id(job.projection.node), []).append(job)
    return [
        Unit(
            tuple(Override(job.name, job.weights, job.activations) for job in group),
            group[0].projection.layer,
            " ".join(job.projection.role for job in group),
            group[0].projection.node.name,
        )
        for group in groups.values()
    ]


def alone(recipe: Recipe, overrides: Any) -> Recipe:
    """Nothing but these projections quantized, with the recipe's name."""
    return Recipe(layers=tuple(overrides), name=recipe.name)
