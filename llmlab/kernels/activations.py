"""Activations in NumPy, and the gated product of two halves: the oracle of every other implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def sigmoid(x: Array, alpha: float = 1.0) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * alpha * x))  # no overflow, however large x is


def gelu(x: Array, alpha: float = 1.0) -> Array:
    """x · Φ(x), Φ the normal distribution's (Hendrycks & Gimpel, 2016)."""
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2)))


def gelu_tanh(x: Array, alpha: float = 1.0) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Array, alpha: float = 1.0) -> Array:
    """x · sigmoid(alpha · x): SiLU or Swish, and with alpha 1.702 the quick GELU of GPT models."""
    return x * sigmoid(x, alpha)


def relu(x: Array, alpha: float = 1.0) -> Array:
    return np.maximum(x, 0)


ACTIVATIONS: Mapping[str, Callable[[Array, float], Array]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "sigmoid": sigmoid,
}
"""What a gate goes through; `alpha` is the slope inside the sigmoid of silu, and means nothing to gelu and relu."""


def gated_activation(gate_up: Array, *, activation: str, alpha: float = 1.0, gate_first: bool = True) -> Array:
    """activation(gate) · up of gate_up [T, 2 · width], whose halves are gate and up (up and gate if not `gate_first`).

    Returns [T, width] (Shazeer, 2020: GLU variants).
    """
    first, second = np.split(gate_up, 2, axis=-1)
    gate, up = (first, second) if gate_first else (second, first)
    return ACTIVATIONS[activation](gate, alpha) * up
