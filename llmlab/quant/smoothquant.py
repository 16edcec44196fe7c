"""SmoothQuant: outliers of the input are moved into the weights, which round better than activations do.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError

_FLOOR = 1e-5


def smoothing_factor(
    weights: Sequence[np.ndarray],
    absmax: np.ndarray,
    alpha: float,
    tied: Callable[[np.ndarray], np.ndarray] = lambda channels: channels,
) -> NDArray[np.float32]:
    """s [K] = absmax^α / max|W|^(1 − α): the input is divided by it, the columns of the weights [N, K] are multiplied.

    absmax [K]: largest magnitude of each channel of the input that the weights share. α = 0 leaves all of the difficulty to the
    activations, 1 to the weights. Channels that are never seen are left alone. tied: makes numbers [K] equal for channels that need
    one factor. Raises InputError for an α outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}, expected a number from 0 to 1, such as 0.5")
    columns = tied(np.max([np.abs(w.astype(np.float32)).max(0) for w in weights], axis=0))
    inputs = tied(np.asarray(absmax, np.float32))
    factor = np.maximum(inputs, _FLOOR) ** alpha / np.maximum(columns, _FLOOR) ** (1 - alpha)
    return np.where((inputs == 0) | (columns == 0), 1, np.maximum(factor, _FLOOR)).astype(np.float32)
