"""A serving graph in half precision."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.passes.convert_precision import ConvertPrecision
from llmlab.graph.rewrite import run_pass
from llmlab.provenance import step

PRECISIONS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def convert(graph: Graph, precision: str) -> Graph:
    """The serving graph with weights, activations and KV cache (unless it is quantized) in `precision` (float16 or bfloat16); the
    input is not changed.

    Norms, softmax and attention scores compute in float32 inside their nodes; RoPE tables, routers and what follows the
    head stay float32, and so do the logits. A weight that the checkpoint holds in `precision` stays a map into it.
    Raises InputError for another precision or a graph that isn't a float32 serving graph, and UnsupportedModelError
    where a weight is beyond float16's range.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; available: {', '.join(PRECISIONS)}")
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    if graph.activations != "float32":
        raise InputError(f"the graph is in {graph.activations} already: convert the one that optimize returned")
    result = graph.copy()
    run_pass(ConvertPrecision(PRECISIONS[precision]), result)
    result.steps += (step("convert", {"precision": precision}, {}),)
    return result
