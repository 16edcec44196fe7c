"""The walk through the layers: it sees what the whole model sees, goes on with quantized weights, and picks up where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from conftest import Store

from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.quant.calibrate import observe
from llmlab.quant.observers import StatisticsOf
from llmlab.quant.projections import projections
from llmlab.quant.scheme import Weights
from llmlab.quant.solve import Solver
from llmlab.quant.statistics import Statistics
from llmlab.quant.walk import Group, walk

WANTED = frozenset({"absmax", "meanabs", "gram"})


def data(count: int = 8, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 96, n) for n in (1, 64, *rng.integers(2, 60, count - 2))]


def solver(graph: Graph, *, sequential: bool = True, method: str = "gptq") -> Solver:
    layers = [p.name for p in projections(graph) if p.layer is not None]
    return Solver(graph, {name: (Weights("int4", 16, method=method, sequential=sequential), None) for name in layers})


def taken(graph: Graph, own: Solver, **options: Any) -> tuple[dict[str, Statistics], dict[str, dict[str, np.ndarray]]]:
    """What a walk saw of each group, and what it found."""
    seen: dict[str, Statistics] = {}

    def solve(group: Group, statistics: Statistics) -> dict[str, np.ndarray]:
        seen[group.name] = statistics
        return own.solve(group, statistics)

    steps = walk(graph, data(), own.groups, solve, wanted=lambda group: WANTED, batch_tokens=100, **options)
    return seen, {group.name: dict(arrays) for group, arrays in steps}


def compare(seen: Statistics, expected: Statistics) -> float:
    """The largest difference, relative to the largest number."""
    assert seen.count == expected.count
    pairs = [(getattr(seen, name), getattr(expected, name)) for name in WANTED]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_sees_what_the_whole_model_sees(store: Store, name: str) -> None:
    """Merged products, with biases and without."""
    graph = store.serving(name)
    own = solver(graph, sequential=False)
    taps = {g.tap: StatisticsOf(WANTED) for g in own.groups}
    observe(graph, data(), taps)
    seen, found = taken(graph, own)
    assert list(seen) == [g.name for g in own.groups] == list(found)
    for group in own.groups:
        assert compare(seen[group.name], taps[group.tap].statistics()) < 1e-4


def test_layers_see_what_the_quantized_ones_before_them_give(store: Store) -> None:
    graph = store.serving("llama")
    own = solver(graph)
    seen, found = taken(graph, own, effective=own.effective)
    done = graph.copy()
    by_name = {p.name: p for p in projections(done)}
    wide = [p.load() for p in by_name.values()]
    last = own.groups[-1]
    for group in own.groups[:-1]:
        for name, weight in own.effective(group, found[group.name]).items():
            by_name[name].reader.inputs[by_name[name].index] = gs.Constant(f"{name}.rounded", weight)
    tap = StatisticsOf(WANTED)
    observe(done, data(), {last.tap: tap})
    assert compare(seen[last.name], tap.statistics()) < 1e-4
    original = StatisticsOf(WANTED)
    observe(graph, data(), {last.tap: original})
    assert compare(seen[last.name], original.statistics()) > 1e-2
    assert all(np.array_equal(p.load(), w) for p, w in zip(projections(graph), wide, strict=True)), "left as it was"


class Stop(Exception):
    pass


def test_it_goes_on_where_it_stopped(store: Store, tmp_path: Path) -> None:
    graph, own = store.serving("llama"), solver(store.serving("llama"))
    options: dict[str, Any] = {"effective": own.effective, "wanted": own.wanted, "batch_tokens": 100, "cache": tmp_path}
    straight = {g.name: dict(a) for g, a in walk(graph, data(), own.groups, own.solve, **options | {"cache": None})}
    calls: list[str] = []

    def solve(group: Group, statistics: Statistics) -> dict[str, np.ndarray]:
        if group is own.groups[5] and len(calls) == 5:
            raise Stop
        calls.append(group.name)
        return own.solve(group, statistics)

    with pytest.raises(Stop):
        list(walk(graph, data(), own.groups, solve, **options))
    assert len(calls) == 5
    calls.append("again")
    again = {g.name: dict(a) for g, a in walk(graph, data(), own.groups, solve, **options)}
    assert calls[6:] == [g.name for g in own.groups[5:]], "what was found is not looked for again"
    for name, arrays in straight.items():
        for what, array in arrays.items():
            np.testing.assert_array_equal(again[name][what], array)
    finished = len(calls)
    list(walk(graph, data(), own.groups, solve, **options))
    assert len(calls) == finished
    # other data, another seed or other settings are another walk
    for other in ({"data": data(seed=1)}, {"seed": 1}, {"settings": "x"}):
        given = {"graph": graph, "data": data(), "groups": own.groups, "solve": solve} | options | other
        next(iter(walk(**given)))
        assert len(calls) > finished
        finished = len(calls)
    [folder] = [f for f in tmp_path.iterdir() if len(list(f.glob("*.done"))) > 4]
    assert not list(folder.glob("piece-*.safetensors")), "what nothing reads any more is removed"


def test_a_cache_that_is_damaged_or_no_folder(store: Store, tmp_path: Path) -> None:
    graph, own = store.serving("llama"), solver(store.serving("llama"), sequential=False)
    options: dict[str, Any] = {"wanted": own.wanted, "cache": tmp_path}
    list(walk(graph, data(), own.groups, own.solve, **options))
    for file in tmp_path.glob("*/result-*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"result-.*: damaged .*: remove .* and run again"):
        list(walk(graph, data(), own.groups, own.solve, **options))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written .*: choose another cache"):
        list(walk(graph, data(), own.groups, own.solve, wanted=own.wanted, cache=tmp_path / "file"))


def test_a_nan_is_named_with_its_projection_and_sample(store: Store) -> None:
    graph = store.serving("llama").copy()
    [broken] = [p for p in projections(graph) if p.name == "model.layers.1.self_attn.v_proj"]
    weight = broken.load()
    weight[0] = np.nan
    broken.reader.inputs[broken.index] = gs.Constant("damaged", weight)
    groups = solver(graph, sequential=False).groups
    with pytest.raises(
        InputError, match=r"the input of model.layers.1.self_attn.o_proj holds a NaN in .* sample 0, token 0"
    ):
        list(walk(graph, data(), groups, lambda g, s: {}, wanted=lambda g: WANTED))
