"""What the plugin node `llmlab::MixtureOfExperts` computes, in NumPy: the definition that every lowering is held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmlab.kernels.activations import ACTIVATIONS

Array = NDArray[np.float32]


def gated(
    x: Array,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float = 0.0,
) -> Array:
    """[S, 2 · inner] → [S, inner]: activation(gate) · (up + beta).

    Gate and up are the two halves, or every other column where `interleaved`. A `limit` above zero clips the gate from above and
    up on both sides before anything else.
    """
    inner = x.shape[-1] // 2
    gate, up = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :inner], x[..., inner:])
    if limit > 0:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return ACTIVATIONS[activation](gate, alpha) * (up + beta)


def mixture_of_experts(
    x: Array,
    index: NDArray[np.int64],
    weight: Array,
    gate_up: Array,
    down: Array,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    *,
    transposed: bool = False,
    **gate: float | str | bool,
) -> Array:
    """Each token's weighted sum over its chosen experts: x [T, hidden] → [T, hidden].

    index, weight [T, k]: the experts of each token (of 0 … E − 1) and what each counts. gate_up [E, 2 · inner, hidden],
    down [E, hidden, inner], or with the last two axes swapped where `transposed`. gate_up_bias [E, 2 · inner],
    down_bias [E, hidden]. `gate`: the keywords of `gated`.
    """
    out = np.zeros_like(x)
    for expert in np.unique(index):
        rows, choice = np.nonzero(index == expert)
        first, second = (gate_up[expert], down[expert]) if transposed else (gate_up[expert].T, down[expert].T)
        inner = x[rows] @ first + (0 if gate_up_bias is None else gate_up_bias[expert])
        result = gated(inner, **gate) @ second + (0 if down_bias is None else down_bias[expert])  # type: ignore[arg-type]
        np.add.at(out, rows, (weight[rows, choice, None] * result).astype(x.dtype))
    return out
