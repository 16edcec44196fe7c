"""Quantized products as ONNX Runtime gets them, against plain NumPy on the numbers that are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from small_graphs import ops, rows, run

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.linear import product
from llmlab.graph.lower.onnxruntime_int8 import for_many_rows, lower_int8
from llmlab.graph.lower.onnxruntime_nbits import lower_weight_only
from llmlab.graph.quantized import QuantizedWeight
from llmlab.graph.store.deferred import Packed
from llmlab.quant.grid import Grid
from llmlab.quant.place import place_activation
from llmlab.quant.projections import Projection
from llmlab.quant.scheme import Activations

Floats = NDArray[np.float32]
N, K = 24, 96
GRIDS = [
    Grid("int4", 16),
    Grid("int4", 32),
    Grid("int4", 32, symmetric=False),
    Grid("int4"),
    Grid("int4", per="tensor"),
    Grid("int3", 32),
    Grid("int8", 32),
    Grid("int8"),
    Grid("int8", symmetric=False),
]


def layer(
    grid: Grid, transposed: bool = True, bias: bool = False, depth: int = K, activations: Activations | None = None
) -> tuple[Editor, Floats]:
    """x [T, K] @ W (+ b) with a quantized weight, one row and one group of it zero; and what the weight stands for, [N, K]."""
    wide = np.random.default_rng(3).standard_normal((N, depth)).astype(np.float32)
    wide[5], wide[7, :32] = 0, 0
    wide[9] *= 30
    rounded = grid.quantize(wide)
    zero = None if rounded.zero_point is None else rounded.zero_point.astype(grid.stored)
    stored: list[Any] = [rounded.values.astype(grid.stored), rounded.scale, zero]
    stored = [None if a is None else a.T if not transposed and a.ndim == 2 else a for a in stored]
    made = [
        None if a is None else gs.Constant(name, Packed.of(a) if a.dtype.name == "int4" else np.ascontiguousarray(a))
        for name, a in zip(("weight", "weight_scale", "weight_zero"), stored, strict=True)
    ]
    axis = (1 if grid.group else 0) if transposed else (0 if grid.group else 1)
    assert made[0] is not None and made[1] is not None
    weight = QuantizedWeight(made[0], made[1], made[2], axis, grid.group)
    x = gs.Variable("x", np.dtype(np.float32), ["T", depth])
    graph = Graph(gs.Graph([], [x], [], opset=23), None)  # type: ignore[arg-type]
    edit = Editor(graph)
    biases: list[gs.Tensor] = [gs.Constant("b", rows(N, seed=5))] if bias else []
    out = product(edit, "m", x, [weight.add(edit, "m")], biases, transposed, np.dtype(np.float32))
    node = next(n for n in graph.surgeon.nodes if n.op == "MatMul")
    if activations is not None:
        projection = Projection("m", 0, "linear", node, made[0], made[0], transposed, node, 1)
        place_activation(edit, projection, activations, None if activations.dynamic else 0.03)
    last = edit.add("Identity", "m", [out], dtype=out.dtype, shape=out.shape)
    graph.surgeon.outputs = [last]
    return edit, rounded.dequantize()


def given(count: int = 5, depth: int = K) -> Floats:
    x = rows(count, depth)
    if count > 1:
        x[1] *= 50
        x[-1] = 0
    return x


def computed(edit: Editor, x: Floats) -> Floats:
    sort_nodes(edit.surgeon.cleanup())
    return np.asarray(run(edit.graph, {"x": x, "input_ids": np.zeros(len(x), np.int64)})[0])


def rounded_by_blocks(x: Floats, block: int) -> Floats:
    """What accuracy level 4 makes of the activations: int8 by blocks of each row."""
    parts = np.split(x, range(block, x.shape[1], block), 1)
    scales = [np.maximum(np.abs(p).max(1, keepdims=True) / 127, 1e-30) for p in parts]
    return np.concatenate([np.rint(p / s) * s for p, s in zip(parts, scales, strict=True)], 1).astype(np.float32)


def close(found: Floats, expected: Floats, tolerance: float = 1e-4) -> None:
    """Up to the order of float32 sums, relative to the largest number of each row."""
    assert found.shape == expected.shape
    most = np.abs(expected).max(1, keepdims=True)
    assert (np.abs(found - expected) <= 1e-5 * np.abs(expected) + tolerance * most + 1e-6).all()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [True, False], ids=["NK", "KN"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_weight_only_products(grid: Grid, transposed: bool, bias: bool, count: int) -> None:
    x = given(count)
    edit, weight = layer(grid, transposed, bias)
    exact = computed(edit, x)
    close(exact, x @ weight.T + (rows(N, seed=5) if bias else 0))
    lower_weight_only(edit, 4)
    found = computed(edit, x)
    assert ops(edit.graph) == {"MatMulNBits": 1, "Identity": 1}
    block = next(n for n in edit.surgeon.nodes if n.op == "MatMulNBits").attrs["block_size"]
    close(found, rounded_by_blocks(x, block) @ weight.T + (rows(N, seed=5) if bias else 0))
    steps = np.abs(x).max(1, keepdims=True) / 254  # half of what int8 can tell apart, at most
    assert (np.abs(found - exact) <= steps * np.abs(weight).sum(1) + 1e-5 * np.abs(exact).max()).all()
    if count > 1:
        with pytest.raises(AssertionError):  # activations are rounded: it isn't the exact product
            close(found, exact)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.stored.name == "int4"], ids=str)
def test_level_1_is_exact(grid: Grid) -> None:
    x = given()
    edit, _ = layer(grid)
    exact = computed(edit, x)
    lower_weight_only(edit, 1)
    found = computed(edit, x)
    assert ops(edit.graph) == {"MatMulNBits": 1, "Identity": 1}
    close(found, exact)
    (node,) = (n for n in edit.surgeon.nodes if n.op == "MatMulNBits")
    node.inputs[2].values = node.inputs[2].values[:, ::-1].copy()
    if grid.group:
        with pytest.raises(AssertionError):  # scales in another order
            close(computed(edit, x), exact)


def test_what_stays() -> None:
    for grid, level in ((Grid("fp8"), 4), (Grid("fp8", 16), 4), (Grid("int8"), 1), (Grid("int8", 32), 1)):
        edit, _ = layer(grid)
        before = ops(edit.graph)
        lower_weight_only(edit, level)
        assert ops(edit.graph) == before
    for level in (0, 2, 5, True, "4"):
        with pytest.raises(InputError, match="accuracy_level is"):
            lower_weight_only(layer(Grid("int4", 16))[0], level)  # type: ignore[arg-type]


def test_rows_that_no_block_divides() -> None:
    """A scale of a whole row serves blocks of any size; the last one is filled up."""
    x = given(depth=88)
    for grid in (Grid("int8"), Grid("int4"), Grid("int4", symmetric=False)):
        edit, weight = layer(grid, depth=88)
        lower_weight_only(edit, 4)
        close(computed(edit, x), rounded_by_blocks(x, 32) @ weight.T)
        assert ops(edit.graph) == {"MatMulNBits": 1, "Identity": 1}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [True, False], ids=["NK", "KN"])
@pytest.mark.parametrize("grid", [Grid("int8"), Grid("int8", symmetric=False), Grid("int8", per="tensor")], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_products_of_integers_are_exact(grid: Grid, dynamic: bool, transposed: bool, bias: bool) -> None:
    """Rows of −128 and of 127 too, whose products saturate where a processor multiplies uint8 by int8."""
    x = given()
    x[2], x[3] = 10, -10
    activations = Activations("int8", "token" if dynamic else "tensor", dynamic=dynamic)
    edit, weight = layer(grid, transposed, bias, activations=activations)
    expected = computed(edit, x)
    lower_int8(edit)
    counts = ops(edit.graph)
    assert counts["MatMulIntegerToFloat"] == 1 and not {"MatMul", "DequantizeLinear"} & set(counts)
    close(computed(edit, x), expected)
    with pytest.raises(AssertionError):
        close(expected, x @ weight.T)


def test_products_that_share_activations_share_their_rounding() -> None:
    edit, _ = layer(Grid("int8"), activations=Activations("int8", "token", dynamic=True))
    (node,) = (n for n in edit.surgeon.nodes if n.op == "MatMul")
    other = edit.add("MatMul", "n", list(node.inputs), dtype=np.dtype(np.float32), shape=["T", N])
    edit.surgeon.outputs.append(other)
    expected = run(edit.graph, {"x": given()})
    lower_int8(edit)
    counts = ops(edit.graph)
    assert counts["MatMulIntegerToFloat"] == 2 and counts["QuantizeLinear"] == counts["Div"] - 1 == 1
    for found, exact in zip(run(edit.graph, {"x": given()}), expected, strict=True):
        close(found, exact)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [True, False], ids=["NK", "KN"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_for_many_rows(grid: Grid, transposed: bool, bias: bool) -> None:
    """Activations rounded to int8 by rows, weights again by channels: in NumPy the same, and near the exact product."""
    x = given(12)
    edit, weight = layer(grid, transposed, bias)
    exact = computed(edit, x)
    lower_weight_only(edit, 4)
    sort_nodes(edit.surgeon.cleanup())
    edit.surgeon.inputs.append(gs.Variable("input_ids", np.dtype(np.int64), ["T"]))
    edit = Editor(for_many_rows(edit.graph))
    counts = ops(edit.graph)
    assert counts["MatMulIntegerToFloat"] == 1 and "MatMulNBits" not in counts
    channels = Grid("int8").quantize(weight).dequantize()
    expected = rounded_by_blocks(x, K) @ channels.T + (rows(N, seed=5) if bias else 0)
    found = computed(edit, x)
    close(found, expected)
    steps, finer = np.abs(x).max(1, keepdims=True) / 254, np.abs(weight).max(1) / 254
    bound = steps * np.abs(weight).sum(1) + finer * np.abs(x).sum(1, keepdims=True) + K * steps * finer
    assert (np.abs(found - exact) <= bound + 1e-5 * np.abs(exact).max()).all()
    with pytest.raises(AssertionError):
        close(found, exact)
