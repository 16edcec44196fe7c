"""AWQ's searches: what they find must be better than not searching, and be what an exhaustive search finds."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.quant.awq import clip, search_factor
from llmlab.quant.grid import Grid
from llmlab.quant.smoothquant import smoothing_factor


def layer(outliers: bool = True, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [48, 128] and inputs [256, 128], some channels of which are far larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((256, 128)).astype(np.float32)
    if outliers:
        x[:, rng.permutation(128)[:4]] *= 30
    return rng.standard_t(4, (48, 128)).astype(np.float32), x


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
    both = error(weight, grid.quantize(clip(weight * factor, x / factor, grid)).dequantize() / factor, x)
    assert scaled < 0.6 * nearest and both < 0.5 * nearest
    # clipping alone helps, too; the factors of other channels don't
    assert error(weight, grid.quantize(clip(weight, x, grid)).dequantize(), x) < nearest
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


def test_what_is_clipped_is_the_best_share_of_each_group() -> None:
    weight, x = layer(seed=3)
    grid = Grid("int3", 32)
    found = clip(weight, x, grid)
    shares = 1 - np.arange(11) / 20
    for row, group in ((0, 0), (5, 1), (17, 3), (47, 2)):
        own, seen = weight[row, group * 32 : (group + 1) * 32], x[:, group * 32 : (group + 1) * 32]
        tried = [np.clip(own, -np.abs(own).max() * s, np.abs(own).max() * s) for s in shares]
        errors = [np.square(seen @ (Grid("int3").quantize(t[None]).dequantize()[0] - own)).sum() for t in tried]
        expected = tried[int(np.argmin(errors))]
        np.testing.assert_allclose(found[row, group * 32 : (group + 1) * 32], expected, rtol=1e-5)
    assert (np.abs(found) <= np.abs(weight)).all() and not np.array_equal(found, weight)


def test_rows_of_zeros_and_inputs_that_never_come() -> None:
    weight, x = layer()
    weight[3] = 0
    x[:, 7] = 0
    grid = Grid("int4", 32)
    factor, _ = search_factor([weight], np.abs(x).mean(0), x, [grid])
    assert np.isfinite(factor).all() and (factor > 0).all()
    found = clip(weight * factor, x / factor, grid)
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
