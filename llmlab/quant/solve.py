"""What calibration finds for the projections that share an input: a factor, a scale of the activations, and rounded weights.

Steps: SmoothQuant's factor, where activations ask for it; AWQ's, on top; the weights by their method, on inputs and weights with the
factor in them; then the activations' static scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import ml_dtypes
import numpy as np

from llmlab.graph.graph import Graph
from llmlab.graph.store.packed import is_packed, pack, unpack
from llmlab.quant.activations import static_scale
from llmlab.quant.awq import clip, search_factor
from llmlab.quant.fold import Fold, find_fold
from llmlab.quant.gptq import gptq
from llmlab.quant.grid import Grid, Rounded
from llmlab.quant.projections import Projection, projections
from llmlab.quant.rounding import named
from llmlab.quant.scheme import Activations, Weights, needs_calibration
from llmlab.quant.smoothquant import smoothing_factor
from llmlab.quant.statistics import Statistics
from llmlab.quant.walk import Group

Assigned: TypeAlias = Mapping[str, tuple[Weights | None, Activations | None]]
"""By projection: what its weight and what it multiplies are to become."""
Floats: TypeAlias = np.ndarray
Method: TypeAlias = Callable[[Sequence[np.ndarray], Statistics, Weights], list[Rounded]]


def _by_gptq(weights: Sequence[np.ndarray], seen: Statistics, how: Weights) -> list[Rounded]:
    assert seen.gram is not None
    return gptq(weights, seen.gram, how.grid, act_order=how.act_order, damping=how.damping)


def _by_awq(weights: Sequence[np.ndarray], seen: Statistics, how: Weights) -> list[Rounded]:
    if not _clips(how):
        return _to_nearest(weights, seen, how)
    within = seen.blocks[how.group] if how.group else np.asarray(seen.gram)[None]
    return [clip(w, within, how.grid) for w in weights]


def _clips(how: Weights) -> bool:
    return how.clip and how.per != "tensor"


def _seen_by_awq(how: Weights) -> frozenset[str]:
    within = {f"blocks/{how.group}" if how.group else "gram"} if _clips(how) else set()
    return frozenset({"meanabs", "sample", *within})


def _to_nearest(weights: Sequence[np.ndarray], seen: Statistics, how: Weights) -> list[Rounded]:
    return [how.grid.quantize(w) for w in weights]


METHODS: dict[str, tuple[Method, Callable[[Weights], frozenset[str]]]] = {
    "rtn": (_to_nearest, lambda how: frozenset()),
    "gptq": (_by_gptq, lambda how: frozenset({"gram"})),
    "awq": (_by_awq, _seen_by_awq),
}
"""By name: how weights that share an input are rounded, and what has to be known of that input."""


@dataclass(frozen=True, eq=False)
class Found:
    """factor [K]: what the input is to be divided by, and the columns of all weights multiplied by. scale: of static activations. rounded: by
    projection, the weights with the factor in them, where their method needed the calibration."""

    factor: Floats | None = None
    scale: float | None = None
    rounded: dict[str, Rounded] = field(default_factory=dict)


class Solver:
    """Solves the groups of products of a serving graph, one by one; what it gives can be kept in a file."""

    def __init__(self, graph: Graph, assigned: Assigned) -> None:
        self._assigned = assigned
        self._members: dict[str, list[Projection]] = {}
        self._folds: dict[str, Fold] = {}
        self.groups: list[Group] = []
        by_input: dict[int, list[Projection]] = {}
        any_seen = any(needs_calibration(*asked) for asked in assigned.values())
        for projection in projections(graph):
            if projection.node.op == "MatMul":
                by_input.setdefault(id(projection.input), []).append(projection)
        for sharing in by_input.values():
            chosen = {id(p.node) for p in sharing if any_seen and (needs_calibration(*self._of(p)) or self._goes_on(p))}
            members = [p for p in sharing if id(p.node) in chosen]
            if not members:
                continue
            name = members[0].name
            products: dict[str, dict[str, Callable[[], np.ndarray]]] = {}
            for p in members:
                products.setdefault(p.node.name, {})[p.name] = p.load
            self.groups.append(Group(name, members[0].input.name, products))
            self._members[name] = members
            self._folds[name] = find_fold(list({id(p.node): p.node for p in members}.values()))
        self.settings = repr([(p.name, self._of(p)) for m in self._members.values() for p in m])

    def wanted(self, group: Group) -> frozenset[str]:
        """What has to be seen of the group's input."""
        found: frozenset[str] = frozenset()
        for p in self._members[group.name]:
            weights, activations = self._of(p)
            found |= METHODS[weights.method][1](weights) if weights is not None else frozenset()
            if activations is not None and activations.smooth is not None:
                found |= {"absmax"}
            if activations is not None and not activations.dynamic:
                found |= {"absmax"} if activations.scale == "absmax" else {"absmax", "sample"}
        return found

    def solve(self, group: Group, seen: Statistics) -> dict[str, np.ndarray]:
        """What is found for a group, as arrays that `found` reads."""
        members, tied = self._members[group.name], self._folds[group.name].tied
        loaded = {p.name: p.load() for p in members}
        factor: Floats | None = None
        smooth = next((a.smooth for _, a in map(self._of, members) if a is not None and a.smooth is not None), None)
        if smooth is not None:
            assert seen.absmax is not None
            factor = smoothing_factor(list(loaded.values()), seen.absmax, smooth, tied)
            seen, loaded = seen.scaled(factor), {name: w * factor for name, w in loaded.items()}
        by_awq = {p.name: w for p in members if (w := self._of(p)[0]) is not None and w.method == "awq"}
        if by_awq:
            assert seen.meanabs is not None and seen.sample is not None
            weights = [loaded[name] for name in by_awq]
            with named(group.name):
                grids, clips = [w.grid for w in by_awq.values()], [_clips(w) for w in by_awq.values()]
                extra, exponent = search_factor(weights, tied(seen.meanabs), seen.sample, grids, clips)
            if exponent:
                factor = extra if factor is None else factor * extra
                seen, loaded = seen.scaled(extra), {name: w * extra for name, w in loaded.items()}
        arrays: dict[str, np.ndarray] = {} if factor is None else {"factor": factor}
        for how in dict.fromkeys(w for w, _ in map(self._of, members) if w is not None):
            own = [p.name for p in members if self._of(p)[0] == how]
            if how.method != "rtn":
                with named(own[0]):
                    rounded = METHODS[how.method][0]([loaded[name] for name in own], seen, how)
                for name, weight in zip(own, rounded, strict=True):
                    arrays |= _encoded(name, weight)
        static = next((a for _, a in map(self._of, members) if a is not None and not a.dynamic), None)
        if static is not None:
            arrays["scale"] = np.asarray(static_scale(seen, static.dtype, static.scale), np.float32)
        return arrays

    def found(self, group: Group, arrays: Mapping[str, np.ndarray]) -> Found:
        rounded: dict[str, Rounded] = {}
        for p in self._members[group.name]:
            weights, _ = self._of(p)
            if weights is not None and f"{p.name}/values" in arrays:
                rounded[p.name] = _decoded(p, weights.grid, arrays)
        scale = arrays.get("scale")
        return Found(arrays.get("factor"), None if scale is None else float(scale), rounded)

    def effective(self, group: Group, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights [N, K] that the quantized model multiplies the undivided input by, of those that the walk goes on with."""
        found = self.found(group, arrays)
        by = np.float32(1) if found.factor is None else found.factor
        result: dict[str, np.ndarray] = {}
        for p in self._members[group.name]:
            weights, _ = self._of(p)
            if not self._goes_on(p):
                continue
            if p.name in found.rounded:
                result[p.name] = found.rounded[p.name].dequantize() / by
            elif weights is not None:
                with named(p.name):
                    result[p.name] = weights.grid.quantize(p.load() * by).dequantize() / by
        return result

    def _goes_on(self, projection: Projection) -> bool:
        weights, _ = self._of(projection)
        return weights is not None and weights.sequential

    def _of(self, projection: Projection) -> tuple[Weights | None, Activations | None]:
        return self._assigned.get(projection.name, (None, None))


def _encoded(name: str, rounded: Rounded) -> dict[str, np.ndarray]:
    values = rounded.values
    stored = pack(values.astype(ml_dtypes.int4)) if is_packed(rounded.grid.stored) else values.view(np.uint8)
    arrays = {f"{name}/values": stored, f"{name}/scale": rounded.scale}
    return arrays if rounded.zero_point is None else {**arrays, f"{name}/zero_point": rounded.zero_point}


def _decoded(projection: Projection, grid: Grid, arrays: Mapping[str, np.ndarray]) -> Rounded:
    stored, shape = arrays[f"{projection.name}/values"], projection.shape
    packed = is_packed(grid.stored)
    values = unpack(stored, shape, grid.stored).astype(np.int8) if packed else stored.view(grid.stored)
    return Rounded(grid, values, arrays[f"{projection.name}/scale"], arrays.get(f"{projection.name}/zero_point"))
