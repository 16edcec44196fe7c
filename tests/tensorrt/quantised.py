"""Q/DQ on the linear layers of a lowered graph, with plain absmax scales: what TensorRT has to fuse, not how to choose scales."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, scope, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import DeferredValues, array


@dataclass(frozen=True)
class Recipe:
    """A type for weights, its largest value, and whether activations are in it as well."""

    dtype: np.dtype
    largest: int
    activations: bool
    listed: str
    """What TensorRT calls the type."""
    block: int = 0
    """Rows that share a scale; 0: a scale for each column."""


RECIPES = {
    "int8": Recipe(np.dtype(np.int8), 127, True, "Int8"),
    "int4": Recipe(np.dtype(ml_dtypes.int4), 7, False, "Int4", block=16),
    "fp8": Recipe(np.dtype(ml_dtypes.float8_e4m3fn), 448, True, "FP8"),
}


class _Held(DeferredValues):
    """An array of a type that NumPy has no bytes for."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values.shape, values.dtype)
        self._array = values

    def load(self) -> np.ndarray:
        return self._array


def quantise(graph: Graph, recipe: Recipe, *, activation_scale: float = 0.05) -> int:
    """Put Q/DQ in front of every product with a weight matrix, in place; products in float32 (routers) stay as they are.

    Returns how many weights were quantised.
    """
    edit = Editor(graph)
    surgeon = edit.surgeon
    count = 0
    for node in [n for n in surgeon.nodes if n.op == "MatMul"]:
        x, weight = node.inputs
        if isinstance(x, gs.Constant) or np.dtype(x.dtype) == np.float32 or (values := _matrix(weight)) is None:
            continue
        where, dtype = scope(node), np.dtype(x.dtype)
        quantised, scale, attrs = _rounded(values.astype(np.float32), recipe)
        stored = gs.Constant(edit.name(f"{where}/quantised"), _Held(quantised))
        factor = edit.constant(f"{where}/scale", scale.astype(dtype))
        node.inputs[1] = edit.add(
            "DequantizeLinear", where, [stored, factor], attrs, dtype=dtype, shape=list(values.shape)
        )
        if recipe.activations:
            step = edit.constant(f"{where}/step", np.array(activation_scale, dtype))
            zero = edit.constant(f"{where}/zero", np.array(0).astype(recipe.dtype))
            narrow = edit.add("QuantizeLinear", where, [x, step, zero], dtype=recipe.dtype, shape=x.shape)
            node.inputs[0] = edit.add("DequantizeLinear", where, [narrow, step], dtype=dtype, shape=x.shape)
        count += values.size
    sort_nodes(surgeon.cleanup())
    return count


def _matrix(weight: gs.Tensor) -> np.ndarray | None:
    """The values of a weight [in, out], also where it is stored [out, in]."""
    turned = not isinstance(weight, gs.Constant) and weight.inputs and weight.inputs[0].op == "Transpose"
    stored = weight.inputs[0].inputs[0] if turned else weight
    if not isinstance(stored, gs.Constant) or len(stored.shape) != 2:
        return None
    values = np.asarray(array(stored))
    return values.T if turned else values


def _rounded(weight: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The weight in the recipe's type, its scales, and what the DequantizeLinear has to know."""
    depth, width = weight.shape
    if recipe.block:
        blocks = weight.reshape(depth // recipe.block, recipe.block, width)
        scale = np.abs(blocks).max(1) / recipe.largest + 1e-6
        scaled, attrs = (blocks / scale[:, None]).reshape(depth, width), {"axis": 0, "block_size": recipe.block}
    else:
        scale = np.abs(weight).max(0) / recipe.largest + 1e-6
        scaled, attrs = weight / scale, {"axis": 1}
    floating = recipe.dtype == ml_dtypes.float8_e4m3fn
    return (scaled if floating else np.rint(scaled)).astype(recipe.dtype), scale, attrs
