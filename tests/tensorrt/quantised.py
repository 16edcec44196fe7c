"""Recipes that TensorRT has low-precision products for, and what it calls their types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from static_scales import ANYTHING, static_scale

import llmlab as ll
from llmlab.graph.graph import Graph
from llmlab.quant.projections import projections


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

    with static_scale(0.05):
        result = ll.quantize(graph, recipe, calibration=ANYTHING)
    done = [p for p in projections(result) if p.is_quantized]
    return result, int(sum(np.prod(p.shape) for p in done))
