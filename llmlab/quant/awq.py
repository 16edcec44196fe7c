"""AWQ: channels that matter are scaled up before rounding, and groups are clipped where that helps more than it hurts.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration". Both searches make the error of
the layer's output small on a sample of its inputs; neither needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmlab.quant.grid import Grid

STEPS = 20
"""Exponents that are tried, and shares of the largest weight."""
_LEAST_SHARE = 0.5  # of the largest weight of a group that clipping leaves
_FLOOR = 1e-4
_STRIP = 1 << 24  # numbers of the groups that are clipped together

Floats = NDArray[np.float32]


def search_factor(
    weights: Sequence[np.ndarray], meanabs: np.ndarray, sample: np.ndarray, grids: Sequence[Grid], *, steps: int = STEPS
) -> tuple[Floats, float]:
    """The factor s [K] by which the columns of weights [N, K] that share an input are multiplied, and its exponent α; each weight
    has its grid.

    s = meanabs^α over α in [0, 1], brought to a geometric middle of 1; chosen is the α with the least error of
    (x / s) · round(W s) over `sample` [R, K], summed over the weights. α = 0 changes nothing.
    """
    wide = [w.astype(np.float32) for w in weights]
    exact = [sample @ w.T for w in wide]
    best, chosen, exponent = np.inf, np.ones(len(meanabs), np.float32), 0.0
    for alpha in np.arange(steps) / steps:
        factor = _middled(np.maximum(meanabs, _FLOOR) ** np.float32(alpha))
        inputs = sample / factor
        error = 0.0
        for weight, out, grid in zip(wide, exact, grids, strict=True):
            gap = inputs @ grid.quantize(weight * factor).dequantize().T - out
            error += float(np.vdot(gap, gap))
        if error < best:
            best, chosen, exponent = error, factor, float(alpha)
    return chosen, exponent


def _middled(factor: np.ndarray) -> Floats:
    return (factor / np.sqrt(factor.max() * factor.min())).astype(np.float32)


def clip(weight: np.ndarray, sample: np.ndarray, grid: Grid, *, steps: int = STEPS) -> Floats:
    """A weight [N, K] whose groups are clipped to the share of their largest number that makes each group's part of the
    output most exact over `sample` [R, K]; where no share beats the whole, nothing is clipped."""
    weight = np.asarray(weight, np.float32)
    rows, depth = weight.shape
    if not weight.size or grid.per == "tensor":
        return weight
    group = grid.group or depth
    parts = np.ascontiguousarray(sample.reshape(len(sample), -1, group).transpose(1, 2, 0), np.float32)
    grams = parts @ parts.transpose(0, 2, 1)  # [groups, group, group]
    result = np.empty_like(weight)
    strip = max(1, _STRIP // depth)
    for begin in range(0, rows, strip):
        own = weight[begin : begin + strip]
        blocks = own.reshape(len(own), -1, group)
        largest = np.abs(blocks).max(-1, keepdims=True)
        best = np.full(largest.shape, np.inf, np.float32)
        threshold = largest.copy()
        for step in range(int((1 - _LEAST_SHARE) * steps) + 1):
            most = largest * np.float32(1 - step / steps)
            clipped = np.clip(blocks, -most, most)
            gap = grid.quantize(clipped.reshape(own.shape)).dequantize().reshape(blocks.shape) - blocks
            error = np.einsum("gnk,gnk->gn", gap.transpose(1, 0, 2) @ grams, gap.transpose(1, 0, 2)).T[..., None]
            better = error < best
            best, threshold = np.where(better, error, best), np.where(better, most, threshold)
        result[begin : begin + strip] = np.clip(blocks, -threshold, threshold).reshape(own.shape)
    return result
