"""AWQ's searches: what they find must be better than not searching, and be what an exhaustive search finds."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.quant.awq import clip, search_factor
from llmlab.quant.grid import Grid, Rounded
from llmlab.quant.smoothquant import smoothing_factor
from llmlab.quant.statistics import grams


def layer(outliers: bool = True, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [48, 128] and inputs [256, 128], some channels of which are far larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((256, 128)).astype(np.float32)
    if outliers:
        x[:, rng.permutation(128)[:4]] *= 30
    return rng.standard_t(4, (48, 128)).astype(np.float32), x


def clipped(weight: np.ndarray, x: np.ndarray, grid: Grid) -> Rounded:
    return clip(weight, grams(x, grid.group or weight.shape[1]), grid)


def error(weight: np.ndarray, effective: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (effective - weight).T).sum())


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int3", 64), Grid("int4", 32, symmetric=False), Grid("int4")])
def test_outliers_are_protected(grid: Grid) -> None:
    weight, x = layer()
    meanabs = np.abs(x).mean(0)
    factor, exponent = search_factor([weight], meanabs, x, [grid])
    assert exponent > 0 and np.corrcoef(factor, meanabs)[0, 1] > 0.8
    nearest = error(weight, grid.quantize(weight).dequantize(), x)
    scaled = error(weight, grid.quantize(weight * factor).dequantize() / factor, x)
    both = error(weight, clipped(weight * factor, x / factor, grid).dequantize() / factor, x)
    assert scaled < 0.6 * nearest and both < 0.5 * nearest
    # clipping alone helps, too; the factors of other channels don't
    assert error(weight, clipped(weight, x, grid).dequantize(), x) < nearest
    wrong = np.roll(factor, 1)
    assert error(weight, grid.quantize(weight * wrong).dequantize() / wrong, x) > 0.8 * nearest


def test_the_exponent_is_the_best_of_those_tried() -> None:
    weights, (_, x) = [layer(seed=s)[0] for s in (1, 2)], layer(seed=1)
    grid, meanabs = Grid("int4", 32), np.abs(x).mean(0)
    errors = []
    for alpha in np.arange(20) / 20:
        s = meanabs.astype(np.float64) ** alpha
        s /= np.sqrt(s.max() * s.min())
        errors.append(sum(error(w, grid.quantize((w * s).astype(np.float32)).dequantize() / s, x) for w in weights))
    factor, exponent = search_factor(weights, meanabs, x, [grid, grid])
    assert exponent == np.argmin(errors) / 20 and 0 < exponent < 1
    assert np.isclose(factor.max() * factor.min(), 1, rtol=1e-4)


SHARES = 1 - np.arange(11) / 20


def by_hand(own: np.ndarray, seen: np.ndarray, grid: Grid, low: float, high: float) -> tuple[float, np.ndarray]:
    """The error of a group [G] whose grid is cut off at these shares of its ends, and what the group becomes."""
    wide = own.astype(np.float64)
    if grid.symmetric:
        step, zero = np.abs(wide).max() * high / grid.high, 0.0
    else:
        least, most = min(wide.min() * low, 0.0), max(wide.max() * high, 0.0)
        step = (most - least) / (grid.high - grid.low)
        zero = np.clip(np.round(grid.low - least / step), grid.low, grid.high)
    became = (np.clip(np.round(wide / step) + zero, grid.low, grid.high) - zero) * step
    return float(np.square(seen @ (became - wide)).sum()), became


@pytest.mark.parametrize("dtype", ["int4", "int3"])
def test_what_is_clipped_is_the_best_share_of_each_group(dtype: str) -> None:
    weight, x = layer(seed=3)
    grid = Grid(dtype, 32)
    found = clipped(weight, x, grid)
    for row, group in ((0, 0), (5, 1), (17, 3), (47, 2)):
        own, seen = weight[row, group * 32 : (group + 1) * 32], x[:, group * 32 : (group + 1) * 32]
        _, expected = min((by_hand(own, seen, grid, s, s) for s in SHARES), key=lambda tried: tried[0])
        np.testing.assert_allclose(found.dequantize()[row, group * 32 : (group + 1) * 32], expected, rtol=1e-4)
    assert found.values.min() == grid.low and found.values.max() == grid.high, "the lowest number is of use, too"
    assert (found.scale <= grid.quantize(weight).scale).all() and not np.array_equal(
        found.scale, grid.quantize(weight).scale
    )


def test_a_grid_with_a_zero_point_is_cut_off_at_each_end_by_itself() -> None:
    rng = np.random.default_rng(4)
    weight, x = rng.gamma(1.5, 1, (48, 128)).astype(np.float32) - 1, layer(seed=3)[1]  # a long tail at one end
    grid = Grid("int4", 32, symmetric=False)
    found, errors = clipped(weight, x, grid), {"found": 0.0, "best": 0.0, "both alike": 0.0, "nearest": 0.0}
    for row, group in np.ndindex(48, 4):
        own, seen = weight[row, group * 32 : (group + 1) * 32], x[:, group * 32 : (group + 1) * 32]
        every = {(low, high): by_hand(own, seen, grid, low, high)[0] for low in SHARES for high in SHARES}
        errors["best"] += min(every.values())
        errors["both alike"] += min(every[s, s] for s in SHARES)
        errors["nearest"] += every[1.0, 1.0]
        became = found.dequantize()[row, group * 32 : (group + 1) * 32]
        own_error = float(np.square(seen @ (became.astype(np.float64) - own)).sum())
        assert own_error <= every[1.0, 1.0] * (1 + 1e-4), "to clip nothing is always tried"
        errors["found"] += own_error
    assert errors["found"] < 1.1 * errors["best"]
    assert errors["best"] < 0.95 * errors["both alike"] < errors["nearest"], "or this test can't fail"
    assert errors["found"] < errors["both alike"]


def test_the_exponent_is_chosen_for_weights_that_will_be_clipped() -> None:
    """Clipped by what it saw of the input, and no other exponent of the 20 does much better then."""
    for seed in range(4):
        weight, x = layer(seed=seed)
        grid, meanabs = Grid("int4", 32), np.abs(x).mean(0)
        errors = []
        for alpha in np.arange(20) / 20:
            s = meanabs**alpha
            s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
            errors.append(error(weight, clipped(weight * s, x / s, grid).dequantize() / s, x))
        _, exponent = search_factor([weight], meanabs, x, [grid], [True])
        _, unclipped = search_factor([weight], meanabs, x, [grid])
        assert errors[round(exponent * 20)] < 1.1 * min(errors)
        assert errors[round(exponent * 20)] <= 1.02 * errors[round(unclipped * 20)]


@pytest.mark.parametrize("grid", [Grid("int4", per="tensor"), Grid("int8", 32), Grid("fp8", 32), Grid("int4")])
def test_other_grids_are_never_worse_than_to_nearest(grid: Grid) -> None:
    weight, x = layer(seed=6)
    found, nearest = clipped(weight, x, grid), grid.quantize(weight)
    assert found.grid == grid and found.scale.shape == nearest.scale.shape
    assert error(weight, found.dequantize(), x) <= 1.05 * error(weight, nearest.dequantize(), x)
    if grid.per == "tensor":
        assert np.array_equal(found.values, nearest.values)


def test_a_weight_with_a_nan_is_refused() -> None:
    weight, x = layer()
    weight[5, 5] = np.nan
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        clipped(weight, x, Grid("int4", 32))


def test_rows_of_zeros_and_inputs_that_never_come() -> None:
    weight, x = layer()
    weight[3] = 0
    x[:, 7] = 0
    grid = Grid("int4", 32)
    factor, _ = search_factor([weight], np.abs(x).mean(0), x, [grid])
    assert np.isfinite(factor).all() and (factor > 0).all()
    found = clipped(weight * factor, x / factor, grid).dequantize()
    assert np.isfinite(found).all() and not found[3].any()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothing_shares_the_range_between_inputs_and_weights(alpha: float) -> None:
    weight, x = layer()
    other = layer(seed=5)[0] * 2
    factor = smoothing_factor([weight, other], np.abs(x).max(0), alpha)
    columns = np.maximum(np.abs(weight).max(0), np.abs(other).max(0))
    np.testing.assert_allclose(factor, np.abs(x).max(0) ** alpha / columns ** (1 - alpha), rtol=1e-5)
    np.testing.assert_allclose((x / factor) @ (weight * factor).T, x @ weight.T, rtol=2e-3, atol=2e-3)
    if alpha == 0.5:  # both have the same range then
        np.testing.assert_allclose(np.abs(x / factor).max(0), columns * factor, rtol=1e-4)


def test_smoothing_leaves_alone_what_is_never_seen() -> None:
    weight, x = layer()
    x[:, 5], weight[:, 9] = 0, 0
    factor = smoothing_factor([weight], np.abs(x).max(0), 0.5)
    assert factor[5] == 1 and factor[9] == 1 and (factor > 0).all()
    with pytest.raises(ValueError, match=r"alpha is 1.5, expected a number from 0 to 1"):
        smoothing_factor([weight], np.abs(x).max(0), 1.5)
