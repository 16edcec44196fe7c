"""What calibration keeps of the inputs of a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one tensor [rows, K] over all samples. What wasn't asked for is None.

    absmax, meanabs [K]: largest and mean magnitude of each channel. sample [R, K]: rows chosen at random. gram [K, K]: XᵀX of all rows,
    over their number. count: rows that there were.
    """

    count: int
    absmax: NDArray[np.float32] | None = None
    meanabs: NDArray[np.float32] | None = None
    sample: NDArray[np.float32] | None = None
    gram: NDArray[np.float32] | None = None

    def scaled(self, factor: np.ndarray | None) -> Statistics:
        """Those of the tensor divided by `factor` [K]."""
        if factor is None:
            return self
        by = 1 / np.asarray(factor, np.float32)
        changed: dict[str, Any] = {}
        for name in ("absmax", "meanabs", "sample"):
            if (array := getattr(self, name)) is not None:
                changed[name] = array * by
        if self.gram is not None:
            changed["gram"] = self.gram * by * by[:, None]
        return replace(self, **changed)
