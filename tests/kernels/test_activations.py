"""The NumPy activations against torch's."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.kernels.activations import ACTIVATIONS, gated_activation, silu

X = np.linspace(-30, 30, 241)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_they_are_torchs(kind: str) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    theirs = {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "relu": functional.relu,
        "sigmoid": torch.sigmoid,
    }
    expected = theirs[kind](torch.tensor(X)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[kind](X, 1.0), expected, rtol=1e-12, atol=1e-12)
    others = [k for k in ACTIVATIONS if k != kind]
    assert all(np.abs(ACTIVATIONS[k](X, 1.0) - expected).max() > 1e-4 for k in others)


def test_the_gate_is_the_half_that_is_named() -> None:
    x = np.random.default_rng(0).standard_normal((3, 8))
    found = gated_activation(x, activation="silu", alpha=1.702)
    np.testing.assert_allclose(found, silu(x[:, :4], 1.702) * x[:, 4:])
    swapped = gated_activation(np.roll(x, 4, axis=1), activation="silu", alpha=1.702, gate_first=False)
    np.testing.assert_array_equal(swapped, found)
