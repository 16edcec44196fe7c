"""From a graph and what is asked of its projections to what a calibration found, and that put into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.quant.data import Ids
from llmlab.quant.fold import Fold, find_fold, fold_factor
from llmlab.quant.grid import Rounded
from llmlab.quant.projections import projections
from llmlab.quant.solve import Assigned, Found, Solver
from llmlab.quant.walk import Group, walk


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What a calibration found, by group of projections that share an input."""

    groups: list[tuple[Group, Found]] = field(default_factory=list)

    def rounded(self, rows: dict[str, np.ndarray]) -> dict[str, Rounded]:
        """By projection, the weights whose method needed the calibration; rows: what `fold` gave back."""
        found = {name: weight for _, group in self.groups for name, weight in group.rounded.items()}
        return {name: _with_rows(weight, rows.get(name)) for name, weight in found.items()}

    @property
    def scales(self) -> dict[str, float]:
        """By projection, the static scale of what it multiplies."""
        return {name: found.scale for g, found in self.groups if found.scale is not None for name in g.weights}

    def fold(self, graph: Graph) -> dict[str, np.ndarray]:
        """Put all factors into `graph`, in place: it computes the same, with weights (as yet wide) that round better.

        Gives back, by projection, what its rows were multiplied by for the sake of the product behind it.
        """
        edit = Editor(graph)
        rows: dict[str, np.ndarray] = {}
        everything = projections(graph)
        fixed = {name for _, found in self.groups for name, w in found.rounded.items() if w.grid.per == "tensor"}
        for group, found in self.groups:
            if found.factor is None:
                continue
            members = [p for p in everything if p.name in group.weights]
            nodes = list({id(p.node): p.node for p in members}.values())
            fold = find_fold(nodes)
            if fold.kind == "rows" and any(p.node is fold.node and p.name in fixed for p in everything):
                fold = Fold("mul", nodes[0])  # one scale for a whole weight that is rounded already
            for name, own in fold_factor(edit, members, found.factor, fold, everything).items():
                rows[name] = rows[name] * own if name in rows else own
        return rows


def calibrate(
    graph: Graph,
    assigned: Assigned,
    data: Sequence[Ids],
    *,
    seed: int = 0,
    cache: Path | None = None,
    threads: int | None = None,
) -> Calibrated:
    """Run the model over the data, layer by layer, and solve what needs to see activations.

    assigned: by projection, what becomes of it. Behind a weight with `sequential`, layers see what the rounded one gives; the rounding of
        activations and of the KV cache isn't part of that. cache: see `walk`.
    """
    solver = Solver(graph, assigned)
    if not solver.groups:
        return Calibrated()
    steps = walk(
        graph,
        data,
        solver.groups,
        solver.solve,
        wanted=solver.wanted,
        effective=solver.effective,
        cache=cache,
        settings=solver.settings,
        seed=seed,
        threads=threads,
    )
    return Calibrated([(group, solver.found(group, arrays)) for group, arrays in steps])


def _with_rows(weight: Rounded, rows: np.ndarray | None) -> Rounded:
    if rows is None:
        return weight
    return replace(
        weight, scale=(weight.scale * (rows[:, None] if weight.scale.ndim == 2 else rows)).astype(np.float32)
    )
