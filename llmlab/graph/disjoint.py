"""Disjoint sets: what belongs together, found pair by pair (Tarjan 1975)."""

from __future__ import annotations

from collections.abc import Hashable


class DisjointSets:
    """Each item is a set of its own until it is joined with others."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def find(self, item: Hashable) -> Hashable:
        """The item that stands for the set of `item`."""
        root = item
        while (above := self._above.setdefault(root, root)) != root:
            root = above
        while item != root:  # the way is short the next time
            self._above[item], item = root, self._above[item]
        return root

    def join(self, one: Hashable, other: Hashable) -> None:
        """Make one set of two; that of `other` stands for both."""
        self._above[self.find(one)] = self.find(other)
