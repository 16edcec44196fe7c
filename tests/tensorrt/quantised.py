"""Recipes that TensorRT has low-precision products for, and what it calls their types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

import llmlab as ll
from llmlab.graph.graph import Graph
from llmlab.quant import methods


@dataclass(frozen=True)
class Expected:
    """A recipe; what TensorRT calls the type of its weights, and whether activations are in it as well."""

    recipe: dict[str, Any]
    listed: str
    activations: bool = True


_KEEP = ["embedding", "router", "small", "expert_up", "expert_down"]
RECIPES = {
    "int8": Expected({"base": "int8_w8a8", "keep": _KEEP}, "Int8"),
    "int4": Expected({"base": "int4_rtn_g16", "keep": _KEEP}, "Int4", activations=False),
    "fp8": Expected({"base": "fp8", "keep": _KEEP}, "FP8"),
}


def quantise(graph: Graph, recipe: dict[str, Any]) -> tuple[Graph, int]:
    """A serving graph as the recipe says, static activations with a scale out of the air; and how many weights (numbers) were
    quantised."""

    def static(work: methods.Work, jobs: list[methods.Job]) -> None:
        work.scales.update({job.name: 0.05 for job in jobs})

    with mock.patch.dict(methods.METHODS, static=static):
        result = ll.quantize(graph, recipe, calibration=["anything"])
    done = [p for p in methods.projections(result) if p.is_quantized]
    return result, int(sum(np.prod(p.shape) for p in done))
