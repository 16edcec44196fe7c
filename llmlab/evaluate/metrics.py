"""What separates two engines' answers, as numbers with intervals: KL divergence, bits, shares. NumPy alone, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
_CELLS = 1 << 21
"""Numbers of logits that are held in float64 at a time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over samples, with its 95 % interval; None where a single sample says nothing of the spread."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    """Samples (sequences) that it comes from."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, form: str = ".4f") -> str:
        """`0.0123 (0.0101–0.0150)`."""
        if self.low is None or self.high is None:
            return f"{self.value:{form}}"
        low, high = (f"{end:{form}}".rstrip("%") for end in (self.low, self.high))
        return f"{self.value:{form}} ({low}–{high})"


def ratio(parts: ArrayLike, wholes: ArrayLike, *, seed: int = 0) -> Estimate:
    """sum(parts) / sum(wholes), such as KL summed over a sequence's tokens and their number, one pair a sequence.

    The interval is the bootstrap's (Efron 1979): percentiles over 1,000 draws of as many *sequences* with replacement,
    because the tokens of one sequence are not independent.
    """
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if part.shape != whole.shape or part.ndim != 1 or not len(part) or whole.sum() <= 0:
        raise ValueError(f"expected as many parts as wholes, at least one, got {part.shape} and {whole.shape}")
    value, count = float(part.sum() / whole.sum()), len(part)
    if count < 2:
        return Estimate(value, count=count)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sizes = drawn @ whole
    means = (drawn @ part)[sizes > 0] / sizes[sizes > 0]
    low, high = np.percentile(means, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Estimate(value, float(low), float(high), count)


def share(hits: ArrayLike, of: ArrayLike | None = None, *, seed: int = 0) -> Estimate:
    """The share of samples that are true, or with `of` of a sequence's tokens: hits of so many.

    Where all or none are true, resampling knows of nothing else, and the interval ends where the rule of three has it (Hanley
    and Lippman-Hand 1983): 3/n away, as if tokens were independent.
    """
    right = np.asarray(hits, np.float64)
    wholes = np.ones_like(right) if of is None else np.asarray(of, np.float64)
    found = ratio(right, wholes, seed=seed)
    if found.count < 2 or 0 < found.value < 1:
        return found
    reach = min(1.0, 3 / float(wholes.sum()))
    return Estimate(found.value, max(0.0, found.value - reach), min(1.0, found.value + reach), found.count)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural logarithms of probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def divergence(reference: NDArray[np.floating], logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(reference ‖ logits) in nats of each row of two arrays of logits [rows, vocab]; 0 where they agree."""
    out = np.empty(len(logits))
    for rows in _slices(logits):
        p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
        out[rows] = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)  # rounding may leave -1e-17
    return out


def surprise(logits: NDArray[np.floating], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """-log2 of the probability of each row's target token: bits."""
    out = np.empty(len(logits))
    for rows in _slices(logits):
        out[rows] = -np.take_along_axis(log_softmax(logits[rows]), targets[rows, None], axis=-1)[:, 0] / np.log(2)
    return out


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Place of the first token in which two answers differ, or None; an answer that ends first differs there."""
    if list(one) == list(other):
        return None
    same = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))


def _slices(logits: NDArray[np.floating]) -> list[slice]:
    step = max(1, _CELLS // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
