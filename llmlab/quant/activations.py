"""Static scales of activations: one number a tensor, chosen from what calibration saw."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llmlab.errors import InputError
from llmlab.quant.scheme import SCALES
from llmlab.quant.statistics import Statistics

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_STEPS = 64  # thresholds that are tried
_TINY = float(np.finfo(np.float32).tiny)


def static_scale(statistics: Statistics, dtype: str, method: str = "absmax", percentile: float = 99.99) -> float:
    """The scale of a tensor whose values become `dtype` (int8 symmetric, or fp8 E4M3) times it.

    method: `absmax` maps the largest value that calibration saw to the end of the range; `percentile` that share of the values' magnitudes
    (in percent), and cuts off the rest; `mse` what makes the squared error over the sampled rows least.
    Raises InputError for another method or type, or a percentile outside (0, 100].
    """
    if dtype not in _LARGEST:
        raise InputError(f"activations in {dtype!r}; available: {', '.join(_LARGEST)}")
    if method not in SCALES:
        raise InputError(f"method {method!r} of a static scale; available: {', '.join(SCALES)}")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is {percentile}, expected more than 0 and at most 100, such as 99.99")
    assert statistics.absmax is not None
    most = float(statistics.absmax.max(initial=0))
    if method != "absmax":
        assert statistics.sample is not None
        magnitudes = np.abs(statistics.sample.reshape(-1))
        most = _percentile(magnitudes, percentile) if method == "percentile" else _least_error(magnitudes, most, dtype)
    return most / _LARGEST[dtype] if most >= _TINY * _LARGEST[dtype] else 1.0


def rounded(values: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    """What `values` become by QuantizeLinear and DequantizeLinear."""
    scaled = values / scale
    if dtype == "fp8":
        return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    return np.clip(np.rint(scaled), -128, 127) * np.float32(scale)


def _percentile(magnitudes: np.ndarray, percentile: float) -> float:
    return float(np.percentile(magnitudes, percentile)) if magnitudes.size else 0.0


def _least_error(magnitudes: np.ndarray, most: float, dtype: str) -> float:
    """The threshold with the least squared error, among shares of the largest value down to a sixteenth."""
    if not magnitudes.size or most < _TINY * _LARGEST[dtype]:
        return most
    best, chosen = np.inf, most
    for share in np.geomspace(1, 1 / 16, _STEPS):
        gap = rounded(magnitudes, most * float(share) / _LARGEST[dtype], dtype) - magnitudes
        error = float(np.vdot(gap, gap))
        if error < best:
            best, chosen = error, most * float(share)
    return chosen
