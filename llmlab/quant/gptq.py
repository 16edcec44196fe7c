"""GPTQ: a weight is rounded column by column, and what rounding takes away is made up for by the columns that are left.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". What is made small is
||(W − Ŵ) X||² over the inputs X that the layer met in calibration, of which only the Gram matrix is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError
from llmlab.quant.grid import Grid, Rounded

DAMPING = 0.01
_BLOCK = 128  # columns that are finished before those behind them hear of it
_TRIES = 6  # each with ten times the damping of the one before


def gptq(
    weights: Sequence[np.ndarray],
    gram: np.ndarray,
    grid: Grid,
    *,
    act_order: bool = True,
    static_groups: bool | None = None,
    damping: float = DAMPING,
) -> list[Rounded]:
    """Weights [N, K] that multiply the same input, rounded to `grid`; what depends on the input alone is worked out once.

    gram: XᵀX [K, K] (its scale doesn't matter) of that input. act_order: the columns with the largest inputs go first, so
    that most columns are left to make up for them. static_groups: a group's scale comes from the weight as it was, not
    from what is left of it when its turn comes; act_order needs that (default: as act_order). damping: what is added to the
    diagonal, as a share of its mean. Takes about 5 · K² · 8 bytes.
    Raises InputError for sizes that don't fit, a damping that isn't positive, or a Gram matrix with a NaN.
    """
    gram = np.asarray(gram)
    depth = gram.shape[0]
    if gram.shape != (depth, depth) or any(w.ndim != 2 or w.shape[1] != depth for w in weights):
        raise InputError(f"a Gram matrix {list(gram.shape)} doesn't fit weights {[list(w.shape) for w in weights]}")
    if not damping > 0:
        raise InputError(f"damping is {damping}, expected a positive share such as {DAMPING}")
    if static_groups is None:
        static_groups = act_order
    if act_order and grid.group and not static_groups:
        raise InputError("act_order visits the columns of a group at different times: leave static_groups on")
    diagonal = np.diagonal(gram)
    if not np.isfinite(diagonal).all():
        raise InputError("the Gram matrix of the inputs holds a NaN or an infinity")
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(depth)
    factor = inverse_factor(gram[np.ix_(order, order)], damping)
    dead = diagonal == 0
    return [_rounded(np.where(dead, 0, w.astype(np.float32)), factor, order, grid, static_groups) for w in weights]


def inverse_factor(gram: np.ndarray, damping: float) -> NDArray[np.float64]:
    """The upper triangular U [K, K] with UᵀU = (gram + damping)⁻¹. An input that is always zero counts as 1."""
    damped = gram.astype(np.float64)
    index = np.arange(len(damped))
    diagonal = damped[index, index]
    damped[index, index] = np.where(diagonal == 0, 1, diagonal)
    mean = float(np.mean(damped[index, index])) if len(damped) else 1.0
    for attempt in range(_TRIES):
        damped[index, index] += damping * mean * (1 if attempt == 0 else 9 * 10 ** (attempt - 1))
        try:
            inverse = np.linalg.inv(damped)
            return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)
        except np.linalg.LinAlgError:
            continue
    raise InputError("the Gram matrix of the inputs is no such matrix: it can't be factored with any damping")


def _rounded(weight: np.ndarray, factor: np.ndarray, order: np.ndarray, grid: Grid, static_groups: bool) -> Rounded:
    depth = weight.shape[1]
    group = grid.group
    if group and not static_groups:
        scale = np.empty(grid.scale_shape(weight.shape), np.float32)
        zero = None if grid.symmetric else np.empty(scale.shape, np.int8)
    else:
        scale, zero = grid.scales(weight)
    column = replace(grid, group=0)
    left = np.ascontiguousarray(weight.T[order])  # [K, N]: columns of the weight lie in one piece
    factor = factor.astype(np.float32)
    values = np.empty(left.shape, np.int8 if grid.dtype != "fp8" else grid.stored)
    for begin in range(0, depth, _BLOCK):
        end = min(begin + _BLOCK, depth)
        block = left[begin:end]
        errors = np.empty_like(block)
        for at in range(end - begin):
            place = int(order[begin + at])
            if group and not static_groups and place % group == 0:
                found, offset = column.scales(left[begin + at : begin + at + group].T)
                scale[:, place // group] = found
                if zero is not None and offset is not None:
                    zero[:, place // group] = offset
            own = (scale[:, place // group] if group else scale), zero
            if zero is not None:
                own = own[0], (zero[:, place // group] if group else zero)
            rounded = column.quantize(block[at, :, None], *own)
            values[place] = rounded.values[:, 0]
            pivot = factor[begin + at, begin + at]
            errors[at] = (block[at] - rounded.dequantize()[:, 0]) / pivot
            block[at + 1 :] -= factor[begin + at, begin + at + 1 : end, None] * errors[at]
        left[end:] -= factor[begin:end, end:].T @ errors
    return Rounded(grid, np.ascontiguousarray(values.T), scale, zero)


def output_error(weight: np.ndarray, rounded: np.ndarray, gram: np.ndarray) -> float:
    """||(W − Ŵ) X||², from the Gram matrix of X."""
    gap = weight.astype(np.float64) - rounded
    return float(np.einsum("nk,nk->", gap @ gram.astype(np.float64), gap))
