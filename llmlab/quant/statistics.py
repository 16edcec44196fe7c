"""What calibration keeps of the inputs of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one tensor [rows, K] over all samples. What wasn't asked for is None.

    absmax, meanabs [K]: largest and mean magnitude of each channel. sample [R, K]: rows chosen at random. gram [K, K]: XᵀX of all rows,
    over their number. blocks: by group size G, what of `gram` lies within the groups: [K / G, G, G]. count: rows that there were.
    """

    count: int
    absmax: NDArray[np.float32] | None = None
    meanabs: NDArray[np.float32] | None = None
    sample: NDArray[np.float32] | None = None
    gram: NDArray[np.float32] | None = None
    blocks: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

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
        parts = {group: by.reshape(-1, group) for group in self.blocks}
        changed["blocks"] = {g: of * parts[g][:, None] * parts[g][:, :, None] for g, of in self.blocks.items()}
        return replace(self, **changed)


def grams(rows: np.ndarray, group: int) -> NDArray[np.float32]:
    """XᵀX of each group of columns of rows [R, K]: [K / group, group, group]."""
    parts = np.ascontiguousarray(rows.reshape(len(rows), -1, group).transpose(1, 2, 0), np.float32)
    return np.asarray(parts @ parts.transpose(0, 2, 1))
