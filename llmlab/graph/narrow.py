"""Constants in half precision, computed when they are written, and whether they fit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.store.storage import DeferredValues, array, loaded

_CHUNK = 1 << 22  # values looked at together


class Narrowed(DeferredValues):
    """A constant rounded to another type of floats each time it is asked for, and never kept."""

    def __init__(self, constant: gs.Constant, dtype: np.dtype) -> None:
        super().__init__(tuple(constant.shape), dtype)
        self.sources = [constant._values]

    def load(self) -> np.ndarray:
        return loaded(self.sources[0]).astype(self.dtype)


class NarrowedScale(Narrowed):
    """Scales rounded to another type of floats; none becomes zero or infinite."""

    def load(self) -> np.ndarray:
        return narrow_scale(loaded(self.sources[0]), self.dtype)


def narrow_scale(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Positive scales in `dtype`; what is too small or too large for it becomes its least or largest number."""
    limits = ml_dtypes.finfo(dtype)
    return np.clip(scale, float(limits.smallest_subnormal), float(limits.max)).astype(dtype)


def survives(constant: np.ndarray | None, dtype: np.dtype) -> bool:
    """Whether no number of `constant` becomes infinite or zero in `dtype` (True where there is none)."""
    if constant is None or constant.dtype.name not in ("float32", "bfloat16", "float16"):
        return True
    with np.errstate(over="ignore"):
        after = constant.astype(dtype).astype(np.float32)
    return bool(np.all(np.isfinite(after) & ((after != 0) | (constant == 0))))


def check_range(constant: gs.Constant, dtype: np.dtype) -> None:
    """Raises UnsupportedModelError that names the weight where one of its numbers is beyond `dtype`'s range.

    Only float16's is smaller than that of what checkpoints hold; nothing is read otherwise.
    """
    most = float(ml_dtypes.finfo(dtype).max)
    if most > 1e38 or constant.dtype == dtype:
        return
    flat = array(constant).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        largest = float(np.abs(flat[start : start + _CHUNK].astype(np.float32)).max())
        if not largest <= most:
            raise UnsupportedModelError(
                f"{constant.name}: holds {largest:.4g}, beyond {dtype}'s largest {most:.4g}: convert to bfloat16"
            )
