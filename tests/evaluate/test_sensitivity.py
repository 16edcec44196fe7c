"""`ll.sensitivity` and `ll.search` on a small random llama: against plain engines, from the cache, and within limits."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Store
from rich.console import Console

import llmlab as ll
from llmlab.errors import InputError
from llmlab.evaluate import laboratory as laboratory_module
from llmlab.evaluate.laboratory import Laboratory
from llmlab.evaluate.search import SearchResult
from llmlab.evaluate.sensitivity import Sensitivity
from llmlab.graph.graph import Graph
from llmlab.quant.recipe import Recipe
from llmlab.quant.scheme import Override, Weights

IDS = [np.random.default_rng(n).integers(3, 96, 30).tolist() for n in range(6)]
INT4 = Recipe(Weights("int4", 16), name="int4")
INT8 = Recipe(Weights("int8"), name="int8")
EXACT = {"samples": 6, "length": 64, "threads": 1, "progress": False}


@pytest.fixture(scope="module")
def graph(store: Store) -> Graph:
    return store.serving("llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def measured(graph: Graph, cache: Path) -> Sensitivity:
    return ll.sensitivity(graph, INT4, IDS, cache=cache, **EXACT)  # type: ignore[arg-type]


def test_each_projection_has_its_row(measured: Sensitivity) -> None:
    assert [(row.layer, row.role) for row in measured.rows if row.layer == 1] == [(1, r) for r in ROLES]
    assert len(measured.rows) == 14 and all(row.kl.value > 0 and row.saved_bytes > 0 for row in measured.rows)
    assert measured.rows[0].projections == ("model.layers.0.self_attn.q_proj",)
    assert measured.worst(1)[0].kl.value == max(row.kl.value for row in measured.rows)
    assert measured.together is not None and 0.3 < measured.together.value / measured.sum < 3


ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def test_a_row_is_what_an_engine_of_it_says(graph: Graph, measured: Sensitivity, store: Store, tmp_path: Path) -> None:
    row = next(row for row in measured.rows if (row.layer, row.role) == (1, "down"))
    one = ll.quantize(graph, Recipe(layers=(Override(row.projections[0], Weights("int4", 16)),)))
    engine = ll.build(one, tmp_path / "one")
    wide = ll.build(graph, tmp_path / "wide")
    found = ll.evaluate(engine, IDS, reference=wide, threads=1, costs=False).accuracy
    assert found.kl is not None and found.kl.value == pytest.approx(row.kl.value, rel=1e-6)
    assert wide.size - engine.size == row.saved_bytes
    other = next(r for r in measured.rows if (r.layer, r.role) == (1, "up"))
    assert abs(other.kl.value / row.kl.value - 1) > 1e-3, "another projection has another number"


def test_what_was_measured_is_not_measured_again(
    graph: Graph, measured: Sensitivity, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []
    real = laboratory_module.quantize

    def counted(graph: Graph, recipe: Recipe, *rest: object, **options: object) -> Graph:
        asked.append(recipe)
        return real(graph, recipe, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(laboratory_module, "quantize", counted)
    again = ll.sensitivity(graph, INT4, IDS, cache=cache, **EXACT)  # type: ignore[arg-type]
    assert again == measured and asked == []
    renamed = Recipe(Weights("int4", 16), name="another name")
    ll.sensitivity(graph, renamed, IDS, pattern="*.1.*", cache=cache, **EXACT)  # type: ignore[arg-type]
    assert len(asked) == 1, "the name doesn't matter; all of layer 1 at once wasn't measured before"
    ll.sensitivity(graph, INT4, IDS[:5], pattern="*.1.*down_proj", cache=cache, **EXACT)  # type: ignore[arg-type]
    assert len(asked) == 2, "other data is another measurement; one projection alone is all at once too"
    (half := next(cache.glob("*.json"))).write_text('{"kl": ')
    ll.sensitivity(graph, INT4, IDS, cache=cache, **EXACT)  # type: ignore[arg-type]
    assert len(asked) == 3 or half.read_text() == '{"kl": ', "half a file is no measurement"


def test_products_count_as_one(graph: Graph, measured: Sensitivity, cache: Path) -> None:
    found = ll.sensitivity(graph, INT4, IDS, by="product", pattern="*.0.*", cache=cache, **EXACT)  # type: ignore[arg-type]
    assert [row.role for row in found.rows] == ["q k v", "o", "gate up", "down"]
    single = {row.role: row.saved_bytes for row in measured.rows if row.layer == 0}
    assert found.rows[0].saved_bytes > single["q"] + single["k"]
    kls = {row.role: row.kl.value for row in measured.rows if row.layer == 0}
    assert found.rows[0].kl.value == pytest.approx(kls["q"] + kls["k"] + kls["v"], rel=0.5)


def test_shown_as_a_map_and_as_data(measured: Sensitivity) -> None:
    assert json.loads(json.dumps(measured.to_dict()))["rows"][3]["role"] == "o"
    bundle = measured._repr_mimebundle_()
    assert "<svg" in bundle["text/html"] and "<script" not in bundle["text/html"]
    assert "int4: KL of each projection" in bundle["text/plain"] and "all at once" in bundle["text/plain"]


def test_what_has_no_sensitivity(graph: Graph, store: Store) -> None:
    with pytest.raises(InputError, match="quantizes no projection"):
        ll.sensitivity(graph, Recipe(layers=(Override("*.q_proj"),)), IDS, **EXACT)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no projection matches 'nothing\.\*'"):
        ll.sensitivity(graph, INT4, IDS, pattern="nothing.*", **EXACT)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="by is 'layer', expected projection or product"):
        ll.sensitivity(graph, INT4, IDS, by="layer", **EXACT)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a serving graph"):
        ll.sensitivity(store.plain("llama"), INT4, IDS)


# search


def look(graph: Graph, cache: Path, **limit: float) -> SearchResult:
    return ll.search(graph, [INT8, INT4], IDS, cache=cache, **EXACT, **limit)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uniform(graph: Graph, cache: Path) -> SearchResult:
    return look(graph, cache, max_kl=1e9)


def test_no_limit_worth_the_name_is_the_smallest_engine(uniform: SearchResult) -> None:
    int8, int4 = uniform.uniform["int8"], uniform.uniform["int4"]
    assert list(uniform.uniform) == ["int8", "int4"] and int8.kl.value < int4.kl.value
    assert uniform.measured.size_bytes <= min(int8.size_bytes, int4.size_bytes) < uniform.wide_bytes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_within_bytes_it_is_never_worse_than_a_uniform_recipe(
    graph: Graph, cache: Path, uniform: SearchResult, share: float
) -> None:
    small, large = uniform.uniform["int4"].size_bytes, uniform.wide_bytes
    budget = int(small + share * (large - small)) + 2000
    found = look(graph, cache, max_bytes=budget)
    assert found.measured.size_bytes <= budget
    fitting = [m.kl.value for m in uniform.uniform.values() if m.size_bytes <= budget]
    assert found.measured.kl.value <= min(fitting) * (1 if not share else 0.8)
    assert found.predicted_kl == pytest.approx(found.measured.kl.value, rel=1.0)
    assert found.predicted_bytes == pytest.approx(found.measured.size_bytes, rel=0.05)
    assert len({name for _, _, name in found.chosen}) > 1 or not share


def test_the_recipe_that_is_found_makes_that_engine(
    graph: Graph, cache: Path, uniform: SearchResult, tmp_path: Path
) -> None:
    limit = float(np.sqrt(uniform.uniform["int4"].kl.value * uniform.uniform["int8"].kl.value))
    found = look(graph, cache, max_kl=limit)
    assert found.measured.kl.value <= limit
    recipe = Recipe.parse(json.loads(json.dumps(found.recipe.to_dict())))
    engine = ll.build(ll.quantize(graph, recipe), tmp_path / "found")
    assert engine.size == found.measured.size_bytes
    wide = ll.build(graph, tmp_path / "wide")
    kl = ll.evaluate(engine, IDS, reference=wide, threads=1, costs=False).accuracy.kl
    assert kl is not None and kl.value == pytest.approx(found.measured.kl.value, rel=1e-6)


def test_a_share_of_tokens_as_limit(graph: Graph, cache: Path, uniform: SearchResult) -> None:
    shares = [m.top1.value for m in uniform.uniform.values()]
    limit = sum(shares) / 2
    found = look(graph, cache, min_top1=limit)
    assert found.measured.top1.value >= limit and found.measured.size_bytes < uniform.wide_bytes
    nothing = look(graph, cache, max_kl=1e-12)
    assert nothing.measured.size_bytes == nothing.wide_bytes and not nothing.recipe.layers


def test_of_what_the_estimates_say_no_assignment_is_better(uniform: SearchResult) -> None:
    kls, sizes = zip(*uniform.front, strict=True)
    assert list(kls) == sorted(kls) and list(sizes) == sorted(sizes, reverse=True)
    assert all(a != b for a, b in itertools.pairwise(kls))


def test_a_result_shows_itself(uniform: SearchResult) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(uniform)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "products int4" in shown and "int8 everywhere" in shown and "multiple-choice knapsack" in shown
    assert "<table" in uniform._repr_mimebundle_()["text/html"]
    assert json.loads(json.dumps(uniform.to_dict()))["kind"] == "search"


def test_what_cannot_be_searched(graph: Graph, cache: Path) -> None:
    for candidates, limit, message in (
        ([INT8], {}, "give one limit: max_kl, max_bytes or min_top1"),
        ([INT8], {"max_kl": 1.0, "max_bytes": 5}, "give one limit"),
        ([INT8], {"max_kl": -1.0}, "max_kl is -1.0, expected a number above 0"),
        ([INT8], {"min_top1": 95}, "min_top1 is 95, expected a share of at most 1"),
        ([], {"max_kl": 1.0}, "expected a list of recipes"),
        ("int8", {"max_kl": 1.0}, "expected a list of recipes"),
        ([INT8, INT8], {"max_kl": 1.0}, "two candidates are called int8"),
        (["int8+kv_int8"], {"max_kl": 1.0}, "are not chosen product by product"),
        (["int9"], {"max_kl": 1.0}, "no recipe is named 'int9'"),
    ):
        with pytest.raises(InputError, match=message):
            ll.search(graph, candidates, IDS, **limit)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"max_bytes is 1,000; the smallest engine of these candidates has \d"):
        look(graph, cache, max_bytes=1000)


def test_a_cache_that_cannot_be_written_costs_only_time(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with Laboratory(graph, IDS, samples=2, length=32, threads=1, cache=tmp_path / "file") as laboratory:
        assert laboratory.measure(INT4) == laboratory.measure(INT4)
