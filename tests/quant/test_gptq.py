"""GPTQ against the paper's procedure written out, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.errors import InputError
from llmlab.quant.gptq import gptq, output_error
from llmlab.quant.grid import Grid


def inputs(depth: int, rows: int = 400, seed: int = 0) -> np.ndarray:
    """Correlated inputs with a few large channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, depth // 2)) @ rng.standard_normal((depth // 2, depth))
    x += 0.3 * rng.standard_normal((rows, depth))
    x[:, rng.permutation(depth)[:3]] *= 12
    return x


def by_the_paper(weight: np.ndarray, gram: np.ndarray, grid: Grid, damping: float, act_order: bool) -> np.ndarray:
    """OBQ's update for a fixed order: after each column, that column leaves the inverse (equations 2 and 3 there).

    All rows in float64, no blocks, no Cholesky: the inverse Hessian is updated by elimination, one column at a time.
    """
    depth = len(gram)
    hessian = gram.astype(np.float64) + damping * np.diagonal(gram).mean() * np.eye(depth)
    inverse = np.linalg.inv(hessian)
    left, result = weight.astype(np.float64), np.empty(weight.shape)
    scale, zero = grid.scales(weight)
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(depth)
    for step, q in enumerate(order):
        group = q // grid.group if grid.group else None
        if group is not None and not act_order and q % grid.group == 0:
            found, offset = Grid(grid.dtype, 0, grid.symmetric).scales(left[:, q : q + grid.group].astype(np.float32))
            scale[:, group] = found
            if zero is not None:
                zero[:, group] = offset
        s = scale if group is None else scale[:, group]
        z = 0 if zero is None else (zero if group is None else zero[:, group]).astype(np.float64)
        low = -127 if grid.dtype == "int8" and grid.symmetric else grid.low
        result[:, q] = (np.clip(np.rint(left[:, q] / s) + z, low, grid.high) - z) * s
        error = (left[:, q] - result[:, q]) / inverse[q, q]
        rest = order[step + 1 :]
        left[:, rest] -= np.outer(error, inverse[q, rest])
        inverse = inverse - np.outer(inverse[:, q], inverse[q, :]) / inverse[q, q]
    return result


@pytest.mark.parametrize(
    ("grid", "act_order"),
    [
        (Grid("int4", 16), True),
        (Grid("int4", 16), False),
        (Grid("int4", 16, symmetric=False), True),
        (Grid("int4", 32, symmetric=False), False),
        (Grid("int3", 32), True),
        (Grid("int4"), False),
        (Grid("int8", symmetric=False), True),
    ],
)
def test_the_same_as_the_procedure_of_the_paper(grid: Grid, act_order: bool) -> None:
    depth = 160  # more than one block of columns
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((24, depth)).astype(np.float32)
    gram = (x := inputs(depth)).T @ x
    [found] = gptq([weight], gram, grid, act_order=act_order)
    expected = by_the_paper(weight, gram, grid, 0.01, act_order)
    gap = np.abs(found.dequantize() - expected)
    # float32 here, float64 there: a tie may fall to the other side, and its row goes another way from there on
    assert np.mean(gap.max(1) < 1e-3) >= 0.9
    ratio = output_error(weight, found.dequantize(), gram) / output_error(weight, expected, gram)
    assert 0.97 < ratio < 1.03
    [other] = gptq([weight], gram, grid, act_order=not act_order)
    assert np.mean(np.abs(other.dequantize() - expected).max(1) < 1e-3) < 0.1


@pytest.mark.parametrize(
    "grid", [Grid("int4", 32), Grid("int3", 64), Grid("int4", 64, symmetric=False), Grid("int4"), Grid("fp8")]
)
@pytest.mark.parametrize("act_order", [True, False])
def test_the_error_of_the_outputs_is_below_that_of_rounding_to_nearest(grid: Grid, act_order: bool) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, 128)).astype(np.float32)
    gram = (x := inputs(128)).T @ x
    nearest = output_error(weight, grid.quantize(weight).dequantize(), gram)
    [found] = gptq([weight], gram, grid, act_order=act_order)
    assert output_error(weight, found.dequantize(), gram) < 0.6 * nearest
    # what made it better is the inputs: with those of another layer the advantage is gone
    other = (y := rng.standard_normal((400, 128)) * rng.permutation(np.abs(x).max(0))).T @ y
    [wrong] = gptq([weight], other, grid, act_order=act_order)
    assert output_error(weight, wrong.dequantize(), gram) > 0.8 * nearest


def test_inputs_that_are_uncorrelated_leave_nothing_to_make_up_for() -> None:
    grid, weight = Grid("int4", 32), np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    [found] = gptq([weight], np.diag(np.linspace(1, 9, 64)), grid)
    assert np.array_equal(found.values, grid.quantize(weight).values)


def test_weights_of_one_input_are_rounded_as_each_alone() -> None:
    rng = np.random.default_rng(4)
    weights = [rng.standard_normal((n, 64)).astype(np.float32) for n in (5, 1, 9)]
    gram = (x := inputs(64)).T @ x
    together = gptq(weights, gram, Grid("int4", 16))
    for weight, found in zip(weights, together, strict=True):
        [alone] = gptq([weight], gram, Grid("int4", 16))
        assert np.array_equal(found.values, alone.values)


def test_inputs_that_never_come_and_rows_of_zeros() -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((6, 64)).astype(np.float32)
    weight[2] = 0
    x = inputs(64)
    x[:, [3, 40]] = 0
    [found] = gptq([weight], x.T @ x, Grid("int4", 32))
    assert not found.dequantize()[:, [3, 40]].any() and not found.dequantize()[2].any()
    assert np.isfinite(found.dequantize()).all()
    few = x[:5]  # a Gram matrix of rank 5
    [found] = gptq([weight], few.T @ few, Grid("int4", 32))
    nearest = output_error(weight, Grid("int4", 32).quantize(weight).dequantize(), few.T @ few)
    assert output_error(weight, found.dequantize(), few.T @ few) < nearest


def test_what_does_not_fit_is_said() -> None:
    weight, gram = np.ones((4, 64), np.float32), np.eye(64)
    with pytest.raises(InputError, match=r"\[64, 64\] doesn't fit weights \[\[4, 32\]\]"):
        gptq([weight[:, :32]], gram, Grid("int4", 32))
    with pytest.raises(InputError, match="damping is 0"):
        gptq([weight], gram, Grid("int4", 32), damping=0)
    with pytest.raises(InputError, match="leave static_groups on"):
        gptq([weight], gram, Grid("int4", 32), static_groups=False)
    with pytest.raises(InputError, match="NaN or an infinity"):
        gptq([weight], np.full((64, 64), np.nan), Grid("int4", 32))
