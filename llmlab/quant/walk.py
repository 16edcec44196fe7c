"""The serving graph layer by layer over all of the calibration data, so that memory is that of one layer and one batch.

The graph is cut at its products (`graph/cut.py`). A piece runs over all batches before the next one begins; what it hands on lies in
files meanwhile. When the input of some products has been seen whole, `solve` says what becomes of them, and those products
are computed with what it said: so each layer can be solved on inputs that come from layers already quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmlab.graph.cut import cut
from llmlab.graph.graph import Graph
from llmlab.graph.pieces import Piece
from llmlab.progress import make_bar
from llmlab.quant.calibrate import BATCH_TOKENS, Batch, Runner, batches, check_data, check_finite
from llmlab.quant.data import Ids
from llmlab.quant.observers import StatisticsOf
from llmlab.quant.spill import Arrays, Spill, walk_key
from llmlab.quant.statistics import Statistics

Loader = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Group:
    """Products that share an input.

    name: of the first projection. tap: the input, as its tensor is called in the graph. products: by node, the weights [N, K] of
    the projections that are one in it, by name and in order.
    """

    name: str
    tap: str
    products: Mapping[str, Mapping[str, Loader]]

    @property
    def weights(self) -> dict[str, Loader]:
        """Of all its projections."""
        return {name: load for parts in self.products.values() for name, load in parts.items()}


def walk(
    graph: Graph,
    data: Sequence[Ids],
    groups: Sequence[Group],
    solve: Callable[[Group, Statistics], Arrays],
    *,
    wanted: Callable[[Group], frozenset[str]],
    effective: Callable[[Group, Arrays], Mapping[str, np.ndarray]] = lambda group, arrays: {},
    cache: Path | None = None,
    settings: str = "",
    seed: int = 0,
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[Group, Arrays]]:
    """Yields what `solve` gives for each group, in the order in which the model meets them, as soon as it is known.

    solve: from a group and what was seen of its input, arrays. wanted: what of it is to be seen, as `StatisticsOf` takes it.
    effective: from those arrays, the weights [N, K] by projection with which the model goes on; else it does with its own.
    cache: a folder that keeps what was found, and what an interrupted run needs to go on where it was; used by a run of the same
        graph, data, `settings` and seed.
    Memory: the weights of one group, its statistics (with `gram` 4 · K² bytes, twice that while it grows) and one batch. Files: what
    layers hand on, two or three arrays [tokens, hidden] in float32.
    Raises InputError for data that doesn't fit the model, and where an input holds a NaN or an infinity: which projection's, in
    which sample.
    """
    check_data(graph, data)
    work, capacity = batches(data, batch_tokens), max(len(ids) for ids in data)
    nodes = {node: group for group in groups for node in group.products}
    taps = {group.tap: group for group in groups}
    parts = cut(graph, lambda node: node.name in nodes)
    homes = {c.name: c.made_by for c in parts.crossings}
    end = 1 + max(homes[tap] for tap in taps)
    used = [c for c in parts.crossings if c.made_by < end]
    readers = {c.name: max(r for r in (c.made_by, *c.read_by) if r < end) for c in used}
    settings = f"{settings}|{seed}|{batch_tokens}|{[(g.name, g.tap) for g in groups]}"
    key = "" if cache is None else walk_key(graph, data, settings)
    current: dict[str, np.ndarray] = {}
    with Spill.open(cache, key, readers) as spill, _bar(end * len(work)) as advance:
        for place, piece in enumerate(parts.pieces[:end]):
            met = [taps[name] for name in piece.outputs if name in taps]
            results = {group.name: spill.result(group.name) for group in met}
            if not spill.done(place):
                own = nodes[piece.name].products[piece.name] if piece.marked else None
                run = _Part(piece, capacity, threads) if own is None else _Product(piece, own, current)
                seen = {g.tap: StatisticsOf(wanted(g), seed=seed + place) for g in met if results[g.name] is None}
                for number, batch in enumerate(work):
                    read = [name for name in piece.inputs if name in homes]
                    made = run(batch, spill.read(number, read, homes))
                    for tap, statistics in seen.items():
                        check_finite(made[tap], f"the input of {taps[tap].name}", batch)
                        statistics.add(made[tap])
                    spill.write(place, number, made)
                    advance(1)
                for tap in list(seen):
                    group = taps[tap]
                    results[group.name] = found = dict(solve(group, seen.pop(tap).statistics()))
                    spill.keep(group.name, found)
                spill.finish(place, homes)
            else:
                advance(len(work))
            for name in nodes[piece.name].products[piece.name] if piece.marked else ():
                current.pop(name, None)
            for group in met:
                arrays = results[group.name]
                assert arrays is not None
                current |= effective(group, arrays)
                yield group, arrays


class _Part:
    """A piece between products, in ONNX Runtime."""

    def __init__(self, piece: Piece, capacity: int, threads: int | None) -> None:
        self._outputs = [name for name in piece.outputs if name != "logits" and not name.startswith("kv_cache.")]
        self._runner = Runner(piece.graph, capacity, threads)

    def __call__(self, batch: Batch, given: Arrays) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._runner.run(batch, self._outputs, given), strict=True))


class _Product:
    """A product, in NumPy, with the weights that the walk goes on with."""

    def __init__(self, piece: Piece, parts: Mapping[str, Loader], current: Mapping[str, np.ndarray]) -> None:
        node = piece.graph.surgeon.nodes[-1]
        self._input, self._output = node.inputs[0].name, node.outputs[0].name
        weights = [current[name] if name in current else load() for name, load in parts.items()]
        self._weight = np.concatenate([np.asarray(w, np.float32) for w in weights])

    def __call__(self, batch: Batch, given: Arrays) -> dict[str, np.ndarray]:
        return {self._output: given[self._input] @ self._weight.T}


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    bar, remove = make_bar(
        total, desc="calibrating", bar_format="{desc} |{bar}| {percentage:.0f} % [{elapsed}<{remaining}]"
    )
    try:
        yield bar.update
    finally:
        remove()
