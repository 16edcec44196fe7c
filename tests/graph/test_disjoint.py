"""Disjoint sets against walking over all pairs."""

from __future__ import annotations

import random

from llmlab.graph.disjoint import DisjointSets


def together(pairs: list[tuple[int, int]], start: int) -> set[int]:
    """What can be reached from `start`, by walking."""
    found = {start}
    while more := {b for a, b in [*pairs, *((y, x) for x, y in pairs)] if a in found} - found:
        found |= more
    return found


def test_what_is_joined_belongs_together_and_nothing_else() -> None:
    rng = random.Random(0)
    for count in (0, 1, 8, 20):
        pairs = [(rng.randrange(20), rng.randrange(20)) for _ in range(count)]
        sets = DisjointSets()
        for one, other in pairs:
            sets.join(one, other)
        for item in range(20):
            assert {i for i in range(20) if sets.find(i) == sets.find(item)} == together(pairs, item)
