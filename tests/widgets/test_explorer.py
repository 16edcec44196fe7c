"""The precision explorer: its arithmetic against trying all choices, parts kept by hand, and the engine that it builds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from conftest import Store
from made_up_sensitivity import FACTOR, SAVED, made_up_sensitivities

import llmlab as ll
from llmlab.errors import InputError
from llmlab.evaluate.metrics import Estimate
from llmlab.evaluate.sensitivity import Sensed, Sensitivity
from llmlab.widgets.explorer.explorer import PrecisionExplorer, explore
from llmlab.widgets.explorer.mix import Mix


def sensed(recipe: str, count: int = 6, wide: int = 100) -> Sensitivity:
    rows = [
        Sensed(
            (f"layers.{i // 2}.{'qk'[i % 2]}",),
            i // 2,
            "qk"[i % 2],
            Estimate((i + 1) * 1e-4 * FACTOR[recipe]),
            SAVED[recipe],
        )
        for i in range(count)
    ]
    return Sensitivity(recipe, tuple(rows), wide_bytes=wide)


@pytest.fixture
def mix() -> Mix:
    return Mix([sensed("int8"), sensed("int4_rtn")])


def best(mix: Mix, most_bytes: int, fixed: dict[int, int] | None = None) -> float:
    """The least KL within a budget, by trying everything."""
    found = []
    for picks in itertools.product(range(3), repeat=len(mix.parts)):
        if all(picks[i] == pick for i, pick in (fixed or {}).items()):
            chosen = [mix.options[i][pick] for i, pick in enumerate(picks)]
            if mix.wide_bytes - sum(c.saved for c in chosen) <= most_bytes:
                found.append(sum(c.cost for c in chosen))
    return min(found)


@pytest.mark.parametrize("budget", [100, 97, 89, 82, 75, 70])
def test_a_budget_gives_the_least_kl(mix: Mix, budget: int) -> None:
    assert mix.fit(budget) and mix.size <= budget
    assert mix.kl == pytest.approx(best(mix, budget), abs=1e-12)
    mix.picks[0] = 2 if mix.picks[0] != 2 else 0
    assert mix.kl != pytest.approx(best(mix, budget), abs=1e-12) or mix.size > budget, "another choice is worse"


def test_what_is_kept_by_hand_stays(mix: Mix) -> None:
    mix.put(0, "wide")
    mix.put(5, "int4_rtn")
    for budget in (95, 80, 76):
        assert mix.fit(budget) and mix.picks[0] == 0 and mix.picks[5] == 2
        assert mix.kl == pytest.approx(best(mix, budget, {0: 0, 5: 2}), abs=1e-12)
    assert mix.smallest == 75 and not mix.fit(74), "one part stays wide"
    mix.release(0)
    assert mix.smallest == 70 and mix.fit(74)


def test_sensitivities_that_do_not_go_together() -> None:
    other = Sensitivity("int4_rtn", (Sensed(("layers.0.q", "layers.0.k"), 0, "q k", Estimate(1.0), 5),), wide_bytes=100)
    for found in (
        [],
        [sensed("int8"), sensed("int8")],
        [sensed("int8"), sensed("int4_rtn", wide=7)],
        [sensed("int8"), other],
    ):
        with pytest.raises(InputError, match="sensitivities"):
            Mix(found)


def test_a_part_that_was_measured_with_one_recipe_only() -> None:
    mix = Mix([sensed("int8", 6), sensed("int4_rtn", 4)])
    with pytest.raises(InputError, match="was not measured with int4_rtn"):
        mix.put(5, "int4_rtn")
    assert mix.fit(73) is False and mix.chosen(5) == "int8" and mix.size == 100 - 4 * 5 - 2 * 3


def panel_of(store: Store) -> PrecisionExplorer:
    graph = store.serving("llama")
    return explore(graph, made_up_sensitivities(graph))


def test_the_page_moves_the_expectation(store: Store) -> None:
    panel = panel_of(store)
    before = panel.mix.kl
    drawn = panel.act("budget", value=0)
    assert panel.mix.kl > before and panel.mix.size == panel.mix.smallest and "int4_rtn" in drawn["map"]
    panel.act("brush", value="wide")
    assert set(panel.act("put", "0")) == {"summary", "budget", "front", "map"}
    assert panel.mix.chosen(0) == "wide" and "over the budget" in panel.html() and "by hand" in panel.html()
    panel.act("put", "0")
    assert panel.mix.chosen(0) == "int4_rtn" and not panel.mix.by_hand
    panel.act("put", "0")
    panel.act("release")
    assert not panel.mix.by_hand and "over the budget" not in panel.draw_summary()
    assert "explorer" in panel.static() and "<script" not in panel.static()
    assert panel.act("show", value="int8").keys() == {"map"} and panel.shown == "int8"


def test_a_cell_can_be_reached_and_pressed_by_keyboard(store: Store) -> None:
    map_ = str(panel_of(store).draw_map())
    cells = len(panel_of(store).mix.parts)
    assert map_.count('role="button"') == map_.count('tabindex="0"') == map_.count("aria-pressed=") == cells


def test_it_builds_what_was_chosen(store: Store, tmp_path: Path) -> None:
    panel = panel_of(store)
    heard: list[dict[str, str]] = []
    panel.listen(heard.append)
    panel.act("budget", value=200)
    assert "nothing to quantize" in panel.act("build", value={"folder": str(tmp_path / "e")})["problem"]
    panel.act("budget", value=100)
    assert "folder is empty" in panel.act("build", value={"folder": " "})["problem"]
    panel.act("build", value={"folder": str(tmp_path / "e")})
    engine = panel.wait()
    chosen = {name for o in panel.recipe.layers for name in [o.pattern]}
    made = {p.name for p in ll.quantize(store.serving("llama"), panel.recipe).history[-1].projections if p.weights}
    assert made == chosen and engine.manifest.recipe["name"] == "explored"
    assert any("built" in drawn.get("build", "") for drawn in heard)
    panel.act("build", value={"folder": str(tmp_path / "e")})
    with pytest.raises(InputError, match="exists"):
        panel.wait()
