"""Whether a step of decodes and prompt chunks runs at once or in parts.

Attention over slots pads every row of a run to its longest: 31 decodes beside a chunk of 256 tokens are copied as 32 rows
of 256. A run of its own for the chunk copies no padding, but reads all weights once more. Both are bytes, so they compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PASSES = 3
"""Times that a padded row's bytes move: written and read by the unpacking, written by the attention."""


@dataclass(frozen=True)
class CostModel:
    """Bytes that move: `weights` in every run, `row` for one padded row's queries, keys, values and result, all layers."""

    weights: int
    row: int

    def parts(self, new: NDArray[np.integer], slots: NDArray[np.integer]) -> list[tuple[int, int]]:
        """Ranges of the batch's sequences to run one after another, cheapest of: all at once; decodes (the sequences of
        one new token in front), then the rest; decodes, then each of the rest alone.

        new, slots: [B], new tokens and slot of each sequence.
        """
        longer = np.flatnonzero(new > 1)
        if not len(longer):
            return [(0, len(new))]
        first, total = int(longer[0]), len(new)
        decodes = [(0, first)] if first else []
        rest = [(first, total)]
        alone = [(i, i + 1) for i in range(first, total)]
        return min(([(0, total)], decodes + rest, decodes + alone), key=lambda ranges: self._cost(ranges, new, slots))

    def _cost(self, ranges: Sequence[tuple[int, int]], new: NDArray[np.integer], slots: NDArray[np.integer]) -> int:
        padded = 0
        for start, end in ranges:
            span = int(slots[start:end].max() - slots[start:end].min()) + 1
            padded += span * int(new[start:end].max()) - int(new[start:end].sum())
        return len(ranges) * self.weights + padded * self.row * _PASSES
