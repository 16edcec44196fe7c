"""The instruments that look at engines, in a notebook: what was compiled, which precisions to choose, a build, a bench."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

LONG = 120_000  # ms
TESTS = Path(__file__).parents[1]

HELD = """
from llmlab.widgets.build_panel.run import BuildRun
import threading
held, tell = threading.Event(), BuildRun._watch
def hold(run, told):
    if getattr(told, "unit", "") == "B":  # the weights are being written
        held.wait(60)
    tell(run, told)
BuildRun._watch = hold
"""
"""A build that waits in the midst of its weights, so that a hand can stop it."""


@pytest.fixture(scope="module", params=["llama", pytest.param("tinychat", marks=pytest.mark.slow)])
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def opened(lab, server, store, model, tmp_path_factory):
    """The small model with sensitivities made up, or tinychat with what was measured."""
    graph, engine = store.serving(model), store.engine(model)
    folder, sizes = tmp_path_factory.mktemp("engines"), "max_seq_len=32, max_tokens_per_step=32"
    sensed, options = "made_up_sensitivities(graph)", "context=4, prompt=5, repeat=3, threads=1"
    if model == "tinychat":
        sizes, options = "max_tokens_per_step=32", "threads=1"
        sensed = "[ll.sensitivity(graph, r, by='product', samples=4, threads=1) for r in ('int8', 'int4_rtn')]"
    lab.open(
        server.write(
            f"engines-{model}.ipynb",
            f"import os, sys; os.chdir({str(folder)!r}); sys.path.insert(0, {str(TESTS)!r})\n"
            f"import llmlab as ll\nfrom made_up_sensitivity import made_up_sensitivities\n"
            f"graph, engine = ll.Graph.load({str(store.folder / f'{model}.serving')!r}), ll.Engine.load({str(engine)!r})\n"
            f"narrow = ll.build(ll.quantize(graph, 'int8'), 'int8', {sizes})",
            f"measured = [ll.layers(e, {options}) for e in (engine, narrow)]\nll.inspect(measured[0])",
            "ll.inspect(*measured)",
            f"explorer = ll.explore(graph, {sensed})\nexplorer",
            f"done = ll.watch_build(graph, 'done', {sizes})\ndone.result()\ndone",
            f"{HELD}\nbuilding = ll.watch_build(graph, 'watched', {sizes})\nbuilding",
        )
    )
    lab.page.set_default_timeout(LONG)
    lab.run_all()
    assert graph.kind == "serving"
    lab.engines = folder
    yield lab
    lab.page.set_default_timeout(60_000)


def test_an_engine_shows_which_nodes_its_layers_were_made_of(opened, model):
    panel = opened.panel("engine-view")
    panel.get_by_label("layer").select_option("model.layers.1")
    panel.settled()
    rows = panel.locator(".ev-rows > details")
    names = panel.locator(".ev-rows .ev-name").all_inner_texts()
    assert len(names) > 3 and all("layers.1" in name for name in names), names
    panel.get_by_label("search").fill("attention")
    panel.settled()
    keys, first = opened.page.keyboard, rows.first.locator("summary")
    panel.get_by_role("button", name="Measure again").or_(panel.get_by_label("search")).last.focus()
    for _ in range(4):
        keys.press("Tab")
        if first.evaluate("(e) => e === document.activeElement"):
            break
    expect(first).to_be_focused()
    keys.press("Enter")
    made = rows.first.locator(".ev-made")
    expect(made).to_be_visible()
    expect(made.locator("li code", has_text=re.compile("model.layers.1.self_attn.*Attention")).first).to_be_visible()
    panel.get_by_label("search").fill("")
    panel.settled()
    assert rows.count() == len(names)
    first.focus()
    keys.press("ArrowDown")
    expect(rows.nth(1).locator("summary")).to_be_focused()
    panel.get_by_label("step").select_option("prefill")
    panel.settled()
    expect(panel.locator(".ll-head")).to_contain_text("a prompt of")
    assert panel.nameless() == []
    panel.pictures(f"engine-view-{model}")


def test_two_engines_stand_side_by_side_and_say_who_won(opened, model):
    panel = opened.panel("engine-view", 1)
    expect(panel.locator(".ev-rows > details .ev-pair").first).to_be_visible()
    panel.get_by_label("sort").select_option("difference")
    panel.settled()
    said = panel.locator(".ev-rows .badge").all_inner_texts()
    assert any(re.match(r"(won|lost) .* \(", text) for text in said) and "int8" in " ".join(said), said
    rows = panel.locator(".ev-rows > details")
    every = rows.count()
    panel.get_by_label("layer").select_option("model.layers.0")
    panel.settled()
    assert 2 < rows.count() < every, "what is in other layers alone is left out"
    product = rows.filter(has_text="down_proj").first
    product.locator("summary").click()
    sides = product.locator(".columns > div")
    expect(sides).to_have_count(2)
    for side in range(2):
        expect(sides.nth(side).locator("li code", has_text="down_proj").first).to_be_visible()
    assert panel.nameless() == []
    panel.pictures(f"two-engines-{model}")


def test_a_budget_and_a_hand_choose_precisions_and_an_engine_is_built(opened, model):
    panel = opened.panel("explorer")

    def expected() -> tuple[float, float]:
        """KL and megabytes."""
        text = panel.locator(".ll-summary p b").all_inner_texts()
        return float(text[0].removeprefix("KL ")), float(text[1].removesuffix(" MB").replace(",", ""))

    bar = panel.get_by_role("slider", name="budget")
    bar.focus()
    bar.press("Home")
    panel.settled()
    smallest = expected()
    box = bar.bounding_box()
    opened.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    panel.settled()
    half = expected()
    assert half[0] < smallest[0] and half[1] > smallest[1]
    cell = panel.locator(".map td[role=button]", has_not_text="wide").first
    cell.click()
    panel.settled()
    kept = panel.locator(".map td[aria-pressed=true]")
    expect(kept).to_have_count(1)
    expect(kept).to_contain_text("by hand")
    moved = expected()
    assert moved[0] < half[0] and moved[1] > half[1]
    keys = opened.page.keyboard
    expect(kept).to_be_focused()
    keys.press("Enter")
    panel.settled()
    expect(kept).to_have_count(0)
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft"):  # round in a square
        keys.press(key)
        spoken = opened.page.evaluate("() => document.activeElement.title")
        assert (".layers.1." in spoken) == (key in ("ArrowDown", "ArrowRight")), spoken
    keys.press(" ")
    panel.settled()
    expect(kept).to_have_count(1)
    assert expected() == moved
    field = panel.get_by_label("engine folder")
    field.fill("explored")
    field.press("Tab")
    expect(panel.get_by_role("button", name="Build this")).to_be_focused()
    keys.press("Enter")
    expect(panel.locator(".ll-build [role=status]")).to_contain_text("built explored in", timeout=LONG)
    assert (opened.engines / "explored" / "weights.bin").stat().st_size > 0
    said = opened.python("print(ll.Engine.load('explored').manifest.recipe['name'], explorer.engine.path)")
    assert said.split() == ["explored", "explored"]
    assert panel.nameless() == []
    panel.pictures(f"explorer-{model}")


@pytest.mark.slow
def test_a_build_shows_its_times_and_stopped_leaves_nothing(opened, model):
    panel = opened.panel("build-panel", 1)
    running = panel.get_by_role("row", name=re.compile("weights.*running"))
    expect(running).to_be_visible(timeout=LONG)
    status = panel.get_by_role("status")
    before = status.inner_text()
    assert re.match(r"building: [\d.]+ s, ", before), before
    expect(status).not_to_have_text(before)
    assert [*opened.engines.glob(".watched.*")], "it is in the midst of writing"
    panel.get_by_text("what happened").click()
    stop = panel.get_by_role("button", name="Stop")
    stop.focus()
    opened.page.keyboard.press("Enter")
    panel.settled()
    expect(status).to_contain_text("stopping")
    opened.python("held.set()")
    expect(status).to_contain_text("stopped, nothing was left behind", timeout=LONG)
    expect(stop).to_have_count(0)
    expect(panel.get_by_text("asked to stop")).to_be_visible()
    assert not [*opened.engines.glob("*watched*")], "a half of an engine"
    assert panel.nameless() == []
    finished = opened.panel("build-panel")
    expect(finished.get_by_role("status")).to_contain_text("done")
    expect(finished.get_by_role("row", name=re.compile(r"weights.* s"))).to_be_visible()
    expect(finished.get_by_role("row", name=re.compile(r"weights.bin [\d,]+"))).to_be_visible()
    finished.press("copy that line")
    assert opened.page.evaluate("() => navigator.clipboard.readText()") == "ll.inspect('done')"
    assert finished.nameless() == []
    finished.pictures(f"build-{model}")


@pytest.mark.slow
def test_a_bench_shows_histograms_and_places_prefill_and_decode(opened, model):
    opened.add_cell("bench = ll.bench(engine, (1, 2), prompt=8, output=16, threads=1)\nbench")
    panel = opened.panel("bench-panel")
    expect(panel.get_by_role("status")).to_have_text("done", timeout=LONG)
    for size in (1, 2):
        expect(panel.get_by_role("img", name=re.compile(f"between tokens at batch {size}: 45 values"))).to_be_visible()
        expect(panel.get_by_role("row", name=re.compile(rf"^{size} [\d.]+ ms"))).to_be_visible()
    roof = panel.get_by_role("img", name=re.compile("^Roofline: "))
    for step in ("prefill, 8 tokens", "decode, B=1", "decode, B=2"):
        expect(panel.get_by_role("row", name=re.compile(f"^{step}"))).to_be_visible()
        expect(roof.locator("text", has_text=step)).to_be_visible()
    expect(roof.locator("circle")).to_have_count(3)
    again = panel.get_by_role("button", name="Measure again")
    again.focus()
    opened.page.keyboard.press("Enter")
    panel.settled()
    opened.page.keyboard.press("Tab")
    panel.press("Stop")
    expect(panel.get_by_role("status")).to_have_text("stopped", timeout=LONG)
    again.press("Enter")
    expect(panel.get_by_role("status")).to_have_text("done", timeout=LONG)
    assert panel.nameless() == []
    panel.pictures(f"bench-{model}")
