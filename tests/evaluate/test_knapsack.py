"""The knapsack against all assignments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmlab.evaluate import knapsack
from llmlab.evaluate.knapsack import Assignment, Choice, front


def every(options: list[list[Choice]]) -> list[tuple[float, int]]:
    picks = itertools.product(*options)
    return [(sum(c.cost for c in chosen), sum(c.saved for c in chosen)) for chosen in picks]


def problem(random: np.random.Generator, units: int) -> list[list[Choice]]:
    return [
        [
            Choice(0.0, 0),
            *(Choice(float(random.exponential(1 + 3 * i)), int(random.integers(1, 40) * (i + 1))) for i in range(2)),
        ]
        for _ in range(units)
    ]


def test_least_cost_for_every_saving() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        options = problem(random, int(random.integers(1, 6)))
        found, possible = front(options), every(options)
        assert found[0] == Assignment((0,) * len(options), 0.0, 0)
        for saved in {s for _, s in possible}:
            best = min(cost for cost, s in possible if s >= saved)
            mine = min(a.cost for a in found if a.saved >= saved)
            assert mine == pytest.approx(best)
        assert [a.saved for a in found] == sorted(a.saved for a in found)
        assert all(a.cost < b.cost for a, b in itertools.pairwise(found)), "none is beaten by another"


def test_picks_say_what_cost_and_saving_are() -> None:
    options = problem(np.random.default_rng(1), 5)
    for a in front(options):
        chosen = [unit[pick] for unit, pick in zip(options, a.picks, strict=True)]
        assert a.cost == pytest.approx(sum(c.cost for c in chosen)) and a.saved == sum(c.saved for c in chosen)


def test_greedy_would_miss_what_it_finds() -> None:
    """The best cost a byte first leaves no room: cost 6 for 11 bytes, where 5 does for 10."""
    options = [[Choice(0, 0), Choice(1, 6)], [Choice(0, 0), Choice(5, 10)], [Choice(0, 0), Choice(5, 5)]]
    ten = next(a for a in front(options) if a.saved >= 10)
    assert (ten.cost, ten.saved) == (5, 10)


def test_rounded_bytes_promise_too_little_never_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "BUCKETS", 7)
    options = problem(np.random.default_rng(2), 5)
    found = front(options)
    assert len(found) <= 8
    for a in found:
        chosen = [unit[pick] for unit, pick in zip(options, a.picks, strict=True)]
        assert a.saved == sum(c.saved for c in chosen)


def test_options_that_never_make_sense_are_never_picked() -> None:
    options = [[Choice(0, 0), Choice(float("inf"), 0), Choice(2, -5)], [Choice(0, 0), Choice(1, 3)]]
    assert [(a.picks, a.cost, a.saved) for a in front(options)] == [((0, 0), 0, 0), ((0, 1), 1, 3)]
