"""Serving graph → model that was built → model that runs: two lists of groups as one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from llmlab.graph.disjoint import DisjointSets
from llmlab.graph.lower.origins import Origin, Origins

Group = tuple[tuple[str, ...], tuple[str, ...]]
"""(nodes of the serving graph, what runs)."""


def join_groups(first: Origins, second: Sequence[Origin]) -> tuple[list[Group], list[str]]:
    """The fewest kernels that compute whole serving nodes, and the serving nodes that no kernel computes.

    first: what the serving graph became. second: what became of that; a node that it doesn't name is gone.
    """
    sets = DisjointSets()
    home = {made: i for i, group in enumerate(first.groups) for made in group.made}
    ways: list[set[int]] = []  # groups of `first` by group of `second`
    for group in second:
        mine = {home[name] for name in group.nodes if name in home}
        ways.append(mine)
        for other in mine:
            sets.join(other, min(mine))
    nodes: dict[Hashable, list[str]] = {}
    for i, group in enumerate(first.groups):
        nodes.setdefault(sets.find(i), []).extend(group.nodes)
    kernels: dict[Hashable, list[str]] = {}
    alone: list[Group] = []
    for mine, group in zip(ways, second, strict=True):
        if mine:
            kernels.setdefault(sets.find(min(mine)), []).extend(group.made)
        else:
            alone.append(((), group.made))
    order = {name: i for i, name in enumerate(first.ops)}
    joined: list[Group] = [
        (tuple(sorted(nodes[root], key=order.__getitem__)), tuple(made)) for root, made in kernels.items()
    ]
    gone = [name for root, names in nodes.items() if root not in kernels for name in names]
    return joined + alone, sorted([*first.folded, *gone], key=order.__getitem__)
