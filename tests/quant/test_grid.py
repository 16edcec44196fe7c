"""Rounding to a grid, against a literal loop over numbers."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.errors import InputError
from llmlab.quant.grid import Grid, Rounded

F = np.float32
_ENDS = {"int8": (-128, 127), "int4": (-8, 7), "int3": (-4, 3), "fp8": (-448, 448)}


def nearest_fp8(x: float) -> float:
    """The nearest of all float8_e4m3fn, ties to the one with the even last bit."""
    codes = [c for c in range(256) if c & 127 != 127]
    numbers = np.array(codes, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return float(min(zip(numbers, codes, strict=True), key=lambda n: (abs(n[0] - x), n[1] & 1))[0])


def half_even(x: float) -> int:
    below = math.floor(x)
    if x - below == 0.5:
        return below if below % 2 == 0 else below + 1
    return below if x - below < 0.5 else below + 1


def literal(weight: np.ndarray, dtype: str, group: int, symmetric: bool, per: str) -> np.ndarray:
    """What the weight becomes, number by number."""
    low, high = _ENDS[dtype]
    rows, depth = weight.shape
    out = np.zeros_like(weight)
    for n in range(rows):
        for k in range(depth):
            begin = k // group * group if group else 0
            shared = weight[n, begin : begin + group] if group else weight[n]
            if per == "tensor":
                shared = weight.reshape(-1)
            least, most = min(F(0), *shared), max(F(0), *shared)
            if symmetric:
                scale, zero = max(most, -least) / F(high), 0
                low = -127 if dtype == "int8" else low
            else:
                scale = most / F(high - low) - least / F(high - low)
                zero = 0
            if scale < F(2.0**-126):
                scale = F(1)
            if not symmetric:
                zero = min(max(half_even(float(F(low) - least / scale)), low), high)
            x = float(weight[n, k] / scale)
            fp8 = dtype == "fp8"
            q = nearest_fp8(min(max(x, -448.0), 448.0)) if fp8 else min(max(half_even(x) + zero, low), high)
            out[n, k] = F(q - zero) * scale
    return out


GRIDS = st.one_of(
    st.builds(Grid, st.sampled_from(["int8", "int4", "int3"]), st.just(0), st.booleans(), st.just("channel")),
    st.builds(Grid, st.sampled_from(["int8", "int4", "int3"]), st.sampled_from([16, 32]), st.booleans()),
    st.builds(Grid, st.just("fp8"), st.sampled_from([0, 16])),
    st.builds(Grid, st.sampled_from(["int8", "fp8"]), st.just(0), st.just(True), st.just("tensor")),
)


@st.composite
def weights(draw: Any) -> np.ndarray:
    rows, depth = draw(st.integers(1, 3)), draw(st.sampled_from([32, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    weight = rng.standard_normal((rows, depth)).astype(F) * F(10.0 ** draw(st.integers(-6, 3)))
    kind = draw(st.sampled_from(["plain", "zero row", "outlier", "positive", "ties", "tiny"]))
    if kind == "zero row":
        weight[0] = 0
    elif kind == "outlier":
        weight[-1, 3] *= 1000
    elif kind == "positive":
        weight = np.abs(weight)
    elif kind == "ties":
        weight = np.rint(weight / np.abs(weight).max() * 14).astype(F) / 2
        weight[:, ::16] = 7
    elif kind == "tiny":
        weight = (weight / np.abs(weight).max() * 1e-42).astype(F)
    return weight


@settings(deadline=None, max_examples=120)
@given(weights(), GRIDS)
def test_against_a_loop(weight: np.ndarray, grid: Grid) -> None:
    found = grid.quantize(weight)
    assert found.values.shape == weight.shape and found.scale.shape == grid.scale_shape(weight.shape)
    assert found.scale.dtype == np.float32 and (found.scale > 0).all()
    expected = literal(weight, grid.dtype, grid.group, grid.symmetric, grid.per)
    np.testing.assert_allclose(found.dequantize(), expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(weights(), GRIDS)
def test_no_number_is_off_by_more_than_half_a_step(weight: np.ndarray, grid: Grid) -> None:
    found = grid.quantize(weight)
    error = np.abs(found.dequantize() - weight)
    step = np.broadcast_to(grid._spread(found.scale, weight.shape), weight.shape).astype(np.float64)
    if grid.dtype == "fp8":
        step = np.maximum(step / 256, np.abs(weight) / 8)  # three bits behind the leading one
    rounded_zero = 1.0 if grid.symmetric else 2.0  # the zero point is a whole number: half a step more at the ends
    assert (error <= step / 2 * rounded_zero * (1 + 1e-4) + 1e-38).all()
    again = grid.quantize(weight, found.scale, found.zero_point)
    assert np.array_equal(again.values.view(np.int8), found.values.view(np.int8)), "the same scale, the same numbers"


def test_a_wrong_group_is_seen() -> None:
    """Negative control: the loop notices scales that belong to the group beside."""
    weight = np.random.default_rng(0).standard_normal((2, 64)).astype(F) * np.repeat([1, 5], 32).astype(F)
    grid = Grid("int4", 32)
    found = grid.quantize(weight)
    swapped = Rounded(grid, found.values, found.scale[:, ::-1])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(swapped.dequantize(), literal(weight, "int4", 32, True, "channel"), rtol=1e-6)


def test_more_rows_than_are_rounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float16)
    for grid in (Grid("int4", 32, False), Grid("fp8"), Grid("int8", per="tensor")):
        whole = grid.quantize(weight)
        monkeypatch.setattr("llmlab.quant.grid._STRIP", 128)
        strips = grid.quantize(weight)
        monkeypatch.undo()
        assert np.array_equal(whole.dequantize(), strips.dequantize())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given_scale", [False, True])
def test_no_number(bad: float, given_scale: bool) -> None:
    weight = np.ones((2, 32), F)
    weight[1, 5] = bad
    with pytest.raises(InputError, match="holds a NaN or an infinity"):
        Grid("int8").quantize(weight, np.ones(2) if given_scale else None)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": "int5"}, "dtype is 'int5'; available: int8, int4, int3, fp8"),
        ({"dtype": "int4", "group": 48}, r"group is 48; available: 0 \(a scale a row\), 16, 32, 64, 128, 256"),
        ({"dtype": "fp8", "symmetric": False}, "fp8 has no zero point"),
        ({"dtype": "int8", "per": "row"}, "per is 'row'; available: channel, tensor"),
        ({"dtype": "int8", "per": "tensor", "group": 32}, "give one of the two"),
    ],
)
def test_grids_that_are_none(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Grid(**arguments)


def test_groups_that_do_not_come_out_even() -> None:
    with pytest.raises(InputError, match="rows of 80 numbers don't divide into groups of 32: choose group 16, or 0"):
        Grid("int4", 32).quantize(np.ones((2, 80), F))
    with pytest.raises(InputError, match="rows of 5 numbers don't divide into groups of 32: choose 0, a scale a row"):
        Grid("int4", 32).quantize(np.ones((2, 5), F))
