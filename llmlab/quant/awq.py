"""AWQ: channels that matter are scaled up before rounding, and groups are clipped where that helps more than it hurts.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration". Both searches make the error of
the layer's output small on inputs that calibration saw; neither needs a gradient. To change nothing is always among what they try.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmlab.quant.grid import Grid, Rounded
from llmlab.quant.statistics import grams

STEPS = 20
"""Exponents that are tried, and shares of an end of a group."""
_MOST = STEPS // 2  # steps of a share that clipping may take away
_FEW = tuple((step, step) for step in (0, 3, 6))  # shares of both ends that are tried with each exponent
_ROWS = 1024  # of a weight, by which an exponent is chosen
_FLOOR = 1e-4
_STRIP = 1 << 22  # numbers of the groups that are clipped together

Floats = NDArray[np.float32]


def search_factor(
    weights: Sequence[np.ndarray],
    meanabs: np.ndarray,
    sample: np.ndarray,
    grids: Sequence[Grid],
    clips: Sequence[bool] = (),
    *,
    steps: int = STEPS,
) -> tuple[Floats, float]:
    """The factor s [K] by which the columns of weights [N, K] that share an input are multiplied, and its exponent α; each weight
    has its grid, and may be clipped later (default: none is).

    s = meanabs^α over α in [0, 1], brought to a geometric middle of 1; chosen is the α with the least error of
    (x / s) · round(W s) over `sample` [R, K], summed over the weights, with a few shares of clipping tried where there will be some.
    α = 0 changes nothing. Of a large weight, rows evenly spread stand for all.
    """
    wide = [w[:: -(-max(1, len(w)) // _ROWS)].astype(np.float32) for w in weights]
    exact = [sample @ w.T for w in wide]
    clipped = clips or [False] * len(wide)
    best, chosen, exponent = np.inf, np.ones(len(meanabs), np.float32), 0.0
    for alpha in np.arange(steps) / steps:
        factor = _middled(np.maximum(meanabs, _FLOOR) ** np.float32(alpha))
        inputs = sample / factor
        within = {g.group: grams(inputs, g.group or len(factor)) for g, cut in zip(grids, clipped, strict=True) if cut}
        error = 0.0
        for weight, out, grid, cut in zip(wide, exact, grids, clipped, strict=True):
            scaled = weight * factor
            rounded = clip(scaled, within[grid.group], grid, _FEW) if cut else grid.quantize(scaled)
            gap = inputs @ rounded.dequantize().T - out
            error += float(np.vdot(gap, gap))
        if error < best:
            best, chosen, exponent = error, factor, float(alpha)
    return chosen, exponent


def _middled(factor: np.ndarray) -> Floats:
    return (factor / np.sqrt(factor.max() * factor.min())).astype(np.float32)


def clip(weight: np.ndarray, within: np.ndarray, grid: Grid, shares: Sequence[tuple[int, int]] = ()) -> Rounded:
    """A weight [N, K] on a grid that reaches, in each group, as far as makes the group's part of the output most exact.

    within: XᵀX [K / G, G, G] of the input's channels within each group of G (grids without groups: G = K). A grid with a zero
    point has two ends, and each goes to a share of the least or the largest number of the group, from 1 down to a half: in tenths,
    then in twentieths around the best. One without goes to a share of the largest magnitude, and its lowest number, one step below
    the negative of its highest, takes in what lies there. shares: those to try instead, in twentieths that are cut off
    at the lower and at the upper end. Where no share beats the whole, and where the whole matrix has one scale, this is `grid.quantize`.
    """
    weight = np.asarray(weight, np.float32)
    if not weight.size or grid.per == "tensor":
        return grid.quantize(weight)
    scale, zero = grid.scales(weight)
    rows, depth = weight.shape
    strip = max(1, _STRIP // depth)
    for begin in range(0, rows, strip):
        part = slice(begin, begin + strip)
        blocks = weight[part].reshape(-1, *within.shape[:2]).transpose(1, 0, 2)
        found, offset = _clipped(np.ascontiguousarray(blocks), within, grid, shares)
        scale[part] = found.T.reshape(scale[part].shape)
        if zero is not None and offset is not None:
            zero[part] = offset.T.reshape(zero[part].shape)
    return grid.quantize(weight, scale, zero)


def _clipped(
    blocks: np.ndarray, within: np.ndarray, grid: Grid, shares: Sequence[tuple[int, int]]
) -> tuple[Floats, NDArray[np.int8] | None]:
    """The scales and zero points [groups, rows] of blocks [groups, rows, G] with the least error."""
    least, most = blocks.min(-1), blocks.max(-1)
    error = np.full(least.shape, np.inf, np.float32)
    best = np.zeros((2, *least.shape), np.int64)

    def ends(steps: np.ndarray) -> tuple[Floats, NDArray[np.int8] | None]:
        low, high = (1 - steps / STEPS).astype(np.float32)
        return grid.between(least * low, most * high)

    def attempt(steps: np.ndarray) -> None:
        scale, zero = ends(steps)
        offset = None if zero is None else zero.astype(np.float32)[..., None]
        gap = grid.nearest(blocks / scale[..., None], offset).astype(np.float32)
        if offset is not None:
            gap -= offset
        gap *= scale[..., None]
        gap -= blocks
        own = np.einsum("gnk,gnk->gn", gap @ within, gap)
        better = own < error
        error[better] = own[better]
        best[:, better] = np.broadcast_to(steps, best.shape)[:, better]

    both = range(_MOST + 1) if grid.symmetric else range(0, _MOST + 1, 2)
    tried = shares or [(low, high) for low in both for high in both if low == high or not grid.symmetric]
    for pair in tried:
        attempt(np.array(pair).reshape(2, 1, 1))
    if not shares and not grid.symmetric:
        middle = best.copy()
        for low, high in np.ndindex(3, 3):
            if (low, high) != (1, 1):
                attempt(np.clip(middle + np.array([low - 1, high - 1]).reshape(2, 1, 1), 0, _MOST))
    return ends(best)
