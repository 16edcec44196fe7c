"""Quantized weights in a graph: what they stand for, alone, merged, and stored either way round."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from onnx.reference import ReferenceEvaluator

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.lower.weights import evaluate
from llmlab.graph.quantized import joined, quantized
from llmlab.quant.grid import Grid, Rounded
from llmlab.quant.place import place_weight
from llmlab.quant.projections import Projection, projections
from llmlab.quant.rounding import Rounding

GRIDS = [
    Grid("int8"),
    Grid("int8", symmetric=False),
    Grid("int8", per="tensor"),
    Grid("int8", 16),
    Grid("int4", 16),
    Grid("int4", 32, symmetric=False),
    Grid("int4"),
    Grid("int3", 16),
    Grid("fp8"),
    Grid("fp8", per="tensor"),
    Grid("fp8", 16),
]
EXPERTS, ROWS, DEPTH = 3, 6, 32


def stored(shape: tuple[int, ...], transposed: bool, dtype: type = np.float32) -> tuple[Editor, Projection]:
    """A graph that reads a weight through an Identity, and the weight as a projection."""
    weight = np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)
    weight[..., 0, :] *= 20
    constant = gs.Constant("m.weight", weight)
    out = gs.Variable("out", np.dtype(dtype), list(shape))
    node = gs.Node("Identity", "m/Identity", inputs=[constant], outputs=[out])
    graph = Graph(gs.Graph([node], [], [out], opset=23), None)  # type: ignore[arg-type]
    return Editor(graph), Projection("m", 0, "linear", node, constant, constant, transposed, node, 0)


def computed(edit: Editor) -> np.ndarray:
    """What the graph's one output is, by ONNX's own evaluator."""
    sort_nodes(edit.surgeon.cleanup())
    return np.asarray(ReferenceEvaluator(edit.graph.to_onnx()).run(None, {})[0])


@pytest.mark.parametrize("lazily", [True, False], ids=["when written", "now"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "transposed"),
    [((ROWS, DEPTH), True), ((DEPTH, ROWS), False), ((EXPERTS, ROWS, DEPTH), True), ((EXPERTS, DEPTH, ROWS), False)],
)
def test_what_a_weight_stands_for(shape: tuple[int, ...], transposed: bool, grid: Grid, lazily: bool) -> None:
    edit, projection = stored(shape, transposed)
    rows = projection.load()
    expected = grid.quantize(rows)
    out = place_weight(edit, projection, Rounding(projection, grid) if lazily else expected)
    found = quantized(out)
    assert found is not None and found.dtype == grid.stored.name and projection.is_quantized
    bits = 4 if grid.stored.name == "int4" else 8
    assert found.values._values.nbytes == rows.size * bits // 8
    result = computed(edit)
    assert result.shape == shape
    back = (result if transposed else np.swapaxes(result, -1, -2)).reshape(-1, DEPTH)
    np.testing.assert_array_equal(back, expected.dequantize())
    np.testing.assert_array_equal(found.dequantize(), result)
    if len(shape) == 2:
        edit.surgeon.outputs[0].inputs[0].inputs[0] = found.transposed().add(edit, "turned")
        edit.surgeon.outputs[0].shape = list(shape)[::-1]
        np.testing.assert_array_equal(computed(edit), result.T)


@pytest.mark.parametrize("dtype", [np.float16])
def test_scales_have_the_type_of_the_weight(dtype: type) -> None:
    """And weights are rounded with the scale as it is stored."""
    edit, projection = stored((ROWS, DEPTH), True, dtype)
    place_weight(edit, projection, Rounding(projection, Grid("int8")))
    found = quantized(projection.reader.inputs[0])
    assert found is not None and found.scale.dtype == dtype
    scale = evaluate(found.scale).astype(np.float32)
    expected = Grid("int8").quantize(projection.load(), scale)
    np.testing.assert_array_equal(evaluate(found.values), expected.values)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_merged_weights_are_joined(store: Store, grid: Grid) -> None:
    graph = store.serving("llama").copy()
    edit = Editor(graph)
    merged = [p for p in projections(graph) if p.layer == 0 and p.role in ("q", "k", "v")]
    concat = merged[0].reader.outputs[0]
    assert joined(concat) is None
    rounded: list[Rounded] = []
    for p in merged:
        rounded.append(grid.quantize(p.load()))
        place_weight(edit, p, Rounding(p, grid))
    found = joined(concat)
    assert found is not None and quantized(concat) is None
    expected = np.concatenate([r.dequantize() for r in rounded])
    np.testing.assert_array_equal(found.dequantize(), expected)
    np.testing.assert_array_equal(found.transposed().dequantize(), expected.T)
    edit.replace(concat, found.add(edit, "joined"))
    (again,) = {id(p.reader): p for p in projections(graph) if p.node is merged[0].node}.values()
    np.testing.assert_array_equal(again.load(), expected)


def test_weights_that_are_quantized_differently_are_not_joined(store: Store) -> None:
    graph = store.serving("llama").copy()
    edit = Editor(graph)
    merged = [p for p in projections(graph) if p.layer == 0 and p.role in ("q", "k", "v")]
    for p, grid in zip(merged, (Grid("int8"), Grid("int4", 16), Grid("int8")), strict=True):
        place_weight(edit, p, Rounding(p, grid))
    assert joined(merged[0].reader.outputs[0]) is None
    assert [p.shape for p in projections(graph) if p.node is merged[0].node] == [p.shape for p in merged]


def test_what_can_not_be_rounded_is_named() -> None:
    edit, projection = stored((ROWS, DEPTH), True)
    with pytest.raises(InputError, match="m: rows of 32 numbers don't divide into groups of 64: choose group 16 or 32"):
        Rounding(projection, Grid("int4", 64))
    projection.weight.values[2, 3] = np.nan  # type: ignore[attr-defined]
    place_weight(edit, projection, Rounding(projection, Grid("int4", 16)))
    with pytest.raises(InputError, match="m: holds a NaN or an infinity"):
        edit.graph.to_onnx()


def test_a_wrong_scale_is_seen() -> None:
    """Negative control."""
    edit, projection = stored((ROWS, DEPTH), True)
    grid = Grid("int4", 16)
    rounded = grid.quantize(projection.load())
    place_weight(edit, projection, Rounded(grid, rounded.values, rounded.scale[:, ::-1].copy()))
    off: Any = np.abs(computed(edit) - rounded.dequantize()).max()
    assert off > 0.1
