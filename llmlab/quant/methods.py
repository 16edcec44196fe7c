"""What a recipe needs a calibration for: each method, and what it is given to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.quant.grid import Rounded
from llmlab.quant.kv import quantize_cache
from llmlab.quant.projections import Projection, projections
from llmlab.quant.recipe import Activations, Recipe, Weights


@dataclass
class Job:
    """What is done to one projection; weights and activations None: nothing, for `reason`."""

    projection: Projection
    weights: Weights | None = None
    activations: Activations | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return self.projection.name


@dataclass
class Work:
    """What methods are given, and what they leave: `rounded` has the weight of a projection by name, where it isn't simply rounded to
    nearest, `scales` the scale of its static activations. A method may change the graph (fold factors into weights)."""

    graph: Graph
    recipe: Recipe
    jobs: list[Job]
    calibration: Any = None
    seed: int = 0
    rounded: dict[str, Rounded] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    def refresh(self) -> None:
        """Find the jobs' projections again, after the graph was changed."""
        sort_nodes(self.graph.surgeon.cleanup())
        found = {p.name: p for p in projections(self.graph)}
        for job in self.jobs:
            job.projection = found[job.name]

    @property
    def edit(self) -> Editor:
        return Editor(self.graph)


def _kv_cache(work: Work, jobs: list[Job]) -> None:
    cache = work.recipe.kv_cache
    assert cache is not None
    quantize_cache(work.graph, cache, work.calibration, seed=work.seed)


Method = Callable[[Work, list[Job]], None]
METHODS: dict[str, Method] = {"kv_cache": _kv_cache}
"""Of those jobs that want it, in this order: smooth, awq, gptq, static (activations' scales); and kv_cache, of no jobs."""
_ORDER = ("smooth", "awq", "gptq", "static", "kv_cache")


def run_methods(work: Work) -> None:
    """Do all that needs a calibration. Raises InputError where there is none."""
    for name in _ORDER:
        jobs = [job for job in work.jobs if name in wanted(job)]
        if not jobs and not (name == "kv_cache" and work.recipe.kv_cache is not None):
            continue
        if work.calibration is None:
            raise InputError(
                f"{work.recipe.name or 'this recipe'} needs a calibration ({name}): pass calibration=, such as a list of texts"
            )
        if name not in METHODS:
            raise InputError(f"{name} is not available in this version; choose a recipe that rounds to nearest")
        METHODS[name](work, jobs)
        work.refresh()


def wanted(job: Job) -> set[str]:
    """The methods that a job needs."""
    found = {job.weights.method} if job.weights is not None else set()
    if job.activations is not None:
        if job.activations.smooth is not None:
            found.add("smooth")
        if not job.activations.dynamic:
            found.add("static")
    return found
