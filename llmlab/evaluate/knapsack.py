"""The multiple-choice knapsack: one choice a unit, the least cost for every number of bytes saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKETS = 4000
"""Steps in which bytes are counted."""


@dataclass(frozen=True)
class Choice:
    """What one option of a unit costs, and the bytes that it saves."""

    cost: float
    saved: int


@dataclass(frozen=True)
class Assignment:
    """One option for each unit; costs and savings add up."""

    picks: tuple[int, ...]
    cost: float
    saved: int


def front(options: Sequence[Sequence[Choice]]) -> list[Assignment]:
    """Assignments that no other beats in cost and bytes saved, from nothing saved to the most.

    Dynamic programming over units (Kellerer, Pferschy and Pisinger 2004, chapter 11), exact but for bytes: each option's
    are rounded down to 1/4000 of all that can be saved, so that a predicted saving is never promised too high.
    """
    most = sum(max(choice.saved for choice in unit) for unit in options)
    grain = max(1, -(-most // BUCKETS))
    width = most // grain + 1
    cost: NDArray[np.float64] = np.full(width, np.inf)  # by buckets saved, exactly
    cost[0] = 0.0
    picked = np.zeros((len(options), width), np.int32)
    for number, unit in enumerate(options):
        after = np.full(width, np.inf)
        for index, choice in enumerate(unit):
            shift = max(0, choice.saved) // grain
            reached = np.full(width, np.inf)
            reached[shift:] = cost[: width - shift] + choice.cost
            better = reached < after
            after[better], picked[number, better] = reached[better], index
        cost = after
    found: list[Assignment] = []
    least = np.inf
    for bucket in range(width - 1, -1, -1):  # who saves more for less comes first
        if cost[bucket] < least:
            least = float(cost[bucket])
            found.append(_trace(options, picked, bucket, grain))
    return found[::-1]


def _trace(options: Sequence[Sequence[Choice]], picked: NDArray[np.int32], bucket: int, grain: int) -> Assignment:
    picks = []
    for number in range(len(options) - 1, -1, -1):
        pick = int(picked[number, bucket])
        picks.append(pick)
        bucket -= max(0, options[number][pick].saved) // grain
    chosen = [unit[pick] for unit, pick in zip(options, picks[::-1], strict=True)]
    return Assignment(tuple(picks[::-1]), sum(c.cost for c in chosen), sum(c.saved for c in chosen))
