"""Sensitivities that nobody measured, for tests of what is done with them."""

from __future__ import annotations

from llmlab.evaluate.metrics import Estimate
from llmlab.evaluate.sensitivity import Sensed, Sensitivity, units
from llmlab.graph.graph import Graph
from llmlab.quant.recipe import Recipe

SAVED = {"int8": 3, "int4_rtn": 5}
FACTOR = {"int8": 1.0, "int4_rtn": 7.0}


def made_up_sensitivities(graph: Graph) -> list[Sensitivity]:
    """One for each recipe of `FACTOR`, by product: later parts cost more, int4 costs seven times as much and saves 5 MB instead of 3."""
    found = []
    for name, factor in FACTOR.items():
        parts = units(graph, Recipe.parse(name), "product")
        rows = tuple(
            Sensed(
                u.projections, u.layer, u.role, Estimate(1e-3 * factor * (1 + i)), 1_000_000 * SAVED[name], u.overrides
            )
            for i, u in enumerate(parts)
        )
        found.append(Sensitivity(name, rows, wide_bytes=250_000_000))
    return found
