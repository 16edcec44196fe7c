"""Metrics against plain Python sums, and whether their intervals cover what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmlab.evaluate import metrics
from llmlab.evaluate.metrics import (
    Estimate,
    divergence,
    first_difference,
    log_softmax,
    ratio,
    share,
    surprise,
)

RANDOM = np.random.default_rng(3)


def plain_probabilities(row: np.ndarray) -> list[float]:
    top = max(map(float, row))
    powers = [math.exp(float(x) - top) for x in row]
    total = math.fsum(powers)
    return [p / total for p in powers]


def plain_kl(p_row: np.ndarray, q_row: np.ndarray) -> float:
    pairs = zip(plain_probabilities(p_row), plain_probabilities(q_row), strict=True)
    return math.fsum(p * (math.log(p) - math.log(q)) for p, q in pairs)


@pytest.mark.parametrize("scale", [0.1, 1.0, 12.0])
def test_kl_and_surprise_are_those_of_plain_sums(scale: float) -> None:
    p, q = (RANDOM.normal(0, scale, (7, 33)).astype(np.float32) for _ in range(2))
    targets = RANDOM.integers(0, 33, 7)
    found = divergence(p, q)
    np.testing.assert_allclose(found, [plain_kl(a, b) for a, b in zip(p, q, strict=True)], rtol=1e-9, atol=1e-15)
    bits = [-math.log2(plain_probabilities(row)[t]) for row, t in zip(q, targets, strict=True)]
    np.testing.assert_allclose(surprise(q, targets), bits, rtol=1e-9)
    assert np.abs(found - divergence(q, p)).max() > 1e-6, "which is the reference matters"


def test_what_kl_sees_and_what_it_does_not() -> None:
    logits = RANDOM.normal(0, 3, (50, 40)).astype(np.float32)
    assert divergence(logits, logits).max() == 0
    assert divergence(logits, logits + 5).max() < 1e-10, "a constant in all logits changes no probability"
    assert divergence(logits, np.roll(logits, 1, axis=1)).min() > 0.1, "tokens shifted by one"
    assert divergence(logits, np.roll(logits, 1, axis=0)).min() > 0.1, "rows shifted by one"
    tiny = divergence(logits, logits + RANDOM.normal(0, 1e-3, logits.shape).astype(np.float32))
    assert tiny.min() > 0 and tiny.max() < 1e-5, "float32 sums would drown it"


def test_far_logits_neither_overflow_nor_become_nan() -> None:
    far = np.array([[3e38, -3e38, 0], [-1e30, -1e30, 0]], np.float32)
    assert divergence(far, far).tolist() == [0, 0]
    assert np.isfinite(log_softmax(far)).all()
    assert np.isnan(divergence(far, np.full_like(far, np.nan))).all(), "NaN stays one"


def test_many_rows_are_done_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = (RANDOM.normal(0, 1, (11, 8)) for _ in range(2))
    whole, bits = divergence(p, q), surprise(q, np.arange(11) % 8)
    monkeypatch.setattr(metrics, "_CELLS", 20)
    np.testing.assert_array_equal(divergence(p, q), whole)
    np.testing.assert_array_equal(surprise(q, np.arange(11) % 8), bits)


def test_ratio_weighs_sequences_by_their_tokens() -> None:
    found = ratio([1.0, 30.0, 2.0], [1, 10, 2])
    assert found.value == 33 / 13 and found.low is not None and found.high is not None
    assert 1 <= found.low < found.value < found.high <= 3
    assert found == ratio([1.0, 30.0, 2.0], [1, 10, 2]), "seeded"
    assert ratio([4.0], [2]) == Estimate(2.0, None, None, 1), "one sequence says nothing of the spread"
    with pytest.raises(ValueError, match="at least one"):
        ratio([], [])


def test_the_interval_is_a_plain_bootstrap() -> None:
    parts, wholes = RANDOM.gamma(1, 2, 40), RANDOM.integers(3, 30, 40)
    found = ratio(parts, wholes)
    means = []
    for _ in range(4000):
        drawn = RANDOM.integers(0, 40, 40)
        means.append(parts[drawn].sum() / wholes[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.low is not None and found.high is not None
    assert abs(found.low - low) < 0.1 * (high - low) and abs(found.high - high) < 0.1 * (high - low)


def test_intervals_cover_the_truth_and_those_over_tokens_would_not() -> None:
    """Tokens of a sequence share its difficulty, so that resampling tokens makes intervals that are far too narrow."""
    random = np.random.default_rng(11)
    covered = by_tokens = 0
    for _ in range(80):
        level = random.gamma(1, 1, 25)  # mean 1
        tokens = np.full(25, 30)
        values = random.exponential(level[:, None], (25, 30))
        found = ratio(values.sum(axis=1), tokens)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1 <= found.high
        one_by_one = ratio(values.ravel(), np.ones(values.size))
        assert one_by_one.low is not None and one_by_one.high is not None
        by_tokens += one_by_one.low <= 1 <= one_by_one.high
    assert covered >= 0.82 * 80
    assert by_tokens < 0.7 * 80


def test_shares_of_nothing_or_all_are_not_certain() -> None:
    assert share([True] * 10) == Estimate(1.0, 0.7, 1.0, 10)
    assert share([False] * 2) == Estimate(0.0, 0.0, 1.0, 2)
    assert share([5.0, 15.0], [5, 15]) == Estimate(1.0, 0.85, 1.0, 2), "of 20 tokens"
    some = share([True, False] * 20)
    assert some.value == 0.5 and some.low is not None and 0.3 < some.low < 0.45
    assert some.show(".1%").startswith("50.0% (")


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None and first_difference([], []) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2 == first_difference([1, 2, 3], [1, 2])
