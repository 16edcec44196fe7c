"""What a recipe needs a calibration for: each method, and what it is given to do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.quant.calibrated import calibrate
from llmlab.quant.data import Ids, calibration_data, default_source, tokenizer_of
from llmlab.quant.grid import Rounded
from llmlab.quant.kv import kv_scales
from llmlab.quant.kv_scales import CACHES, place_scales
from llmlab.quant.projections import Projection, projections
from llmlab.quant.recipe import Recipe
from llmlab.quant.rounding import named
from llmlab.quant.scheme import Activations, Weights, needs_calibration


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
    nearest, `scales` the scale of its static activations. A method may change the graph (fold factors into weights).

    wide: the graph before it was converted to half precision, of its own, which a calibration runs. calibration: data as the caller gave it. cache: a folder
    for what a calibration finds.
    """

    graph: Graph
    wide: Graph
    recipe: Recipe
    jobs: list[Job]
    calibration: Any = None
    seed: int = 0
    cache: Path | None = None
    rounded: dict[str, Rounded] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    _data: list[Ids] | None = None

    def data(self) -> list[Ids]:
        """The calibration data as ids; the zoo's split for the zoo's model. Raises InputError where there is none."""
        if self._data is None:
            with named(self.recipe.name or "this recipe"):
                source = default_source(self.wide) if self.calibration is None else self.calibration
            tokenizer = tokenizer_of(self.wide) if "tokenizer.json" in self.wide.assets else None
            self._data = calibration_data(source, tokenizer, seed=self.seed)
        return self._data

    def refresh(self) -> None:
        """Find the jobs' projections again, after the graph was changed."""
        sort_nodes(self.graph.surgeon.cleanup())
        found = {p.name: p for p in projections(self.graph)}
        for job in self.jobs:
            job.projection = found[job.name]

    @property
    def edit(self) -> Editor:
        return Editor(self.graph)


def run_methods(work: Work) -> None:
    """Do all that needs a calibration. Raises InputError where there is none."""
    for job in work.jobs:
        if job.weights is not None and job.projection.node.op != "MatMul":
            job.weights = replace(job.weights, method="rtn")  # what each expert is given isn't seen
    if any(needs_calibration(job.weights, job.activations) for job in work.jobs):
        found = calibrate(
            work.wide,
            {job.name: (job.weights, job.activations) for job in work.jobs},
            work.data(),
            seed=work.seed,
            cache=work.cache,
        )
        rows = found.fold(work.graph)
        found.fold(work.wide)
        work.rounded, work.scales = found.rounded(rows), found.scales
        work.refresh()
    if (cache := work.recipe.kv_cache) is not None:
        place_scales(work.graph, CACHES[cache.dtype], kv_scales(work.wide, cache, work.data(), seed=work.seed))
