"""The instruments of tinychat in one notebook: look into the graph, step through its passes, watch the scheduler, chat."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

LONG = 60_000  # ms


@pytest.fixture(scope="module")
def opened(lab, server, store):
    graph, engine = store.serving("tinychat"), store.engine("tinychat")
    folder = next(path for path in (store.folder / "tinychat.serving",) if path.exists())
    lab.open(
        server.write(
            "instruments.ipynb",
            f"import llmlab as ll\ngraph = ll.Graph.load({str(folder)!r})\nlook = ll.inspect(graph)\nlook",
            "stepper = ll.steps(graph)\nstepper",
            "monitor = ll.monitor(graph, ['How do I count to nine?', 'How do I count to ten?'], max_tokens=6, prefix_cache=True)\nmonitor",
            "endless = ll.SamplingParams(max_tokens=900, ignore_eos=True)\n"
            f"chat = ll.chat({str(engine)!r}, {str(engine)!r}, names=('one', 'two'), params=endless, threads=1)\nchat",
        )
    )
    lab.run_all()
    assert graph.kind == "serving"
    return lab


def test_the_inspector_unfolds_layers_and_finds_nodes(opened):
    panel = opened.panel("inspector")
    layers = panel.get_by_role("treeitem", name=re.compile("model.layers.0")).first
    layers.click()
    panel.settled()
    expect(layers).to_have_attribute("aria-expanded", "true")
    expect(panel.get_by_role("treeitem", name=re.compile("self_attn")).first).to_be_visible()
    assert panel.latency < 2000
    search = panel.get_by_role("searchbox")
    search.fill("PagedAttention")
    panel.settled()
    panel.get_by_role("listbox", name="hits").locator("[data-act]").first.click()
    panel.settled()
    expect(panel.root).to_contain_text("kv_num_heads")
    panel.get_by_role("combobox", name="show").select_option(label="parameters")
    panel.settled()
    expect(panel.root).to_contain_text("a full bar is the whole")
    assert panel.nameless() == []
    panel.pictures("inspector")


def test_the_stepper_walks_over_the_passes(opened):
    panel = opened.panel("stepper")
    panel.press("next ▸")
    expect(panel.get_by_role("heading", name=re.compile("^2 of"))).to_be_visible()
    panel.press("one that did something ▸▸")
    bar = panel.get_by_role("slider")
    bar.focus()
    bar.press("End")
    panel.settled()
    bar.press("ArrowLeft")
    panel.settled()
    here = int(bar.input_value())
    expect(panel.get_by_role("heading", name=re.compile(f"^{here} of {here + 1}"))).to_be_visible()
    expect(panel.root).to_contain_text(re.compile(r"passes/\w+\.py:\d+"))
    expect(bar).to_be_focused()
    assert panel.nameless() == []
    panel.pictures("stepper")


def test_the_scheduler_goes_one_step_at_a_time(opened):
    panel = opened.panel("monitor")
    panel.press("Step", exact=True)
    expect(panel.root).to_contain_text("Step 1 of 1", timeout=LONG)
    panel.press("Step", exact=True)
    expect(panel.root).to_contain_text("Step 2 of 2", timeout=LONG)
    expect(panel.locator(".integrity")).to_contain_text("Books balance")
    expect(panel.locator("[data-state=used], [data-state=shared]").first).to_be_attached()
    steps = panel.get_by_role("group", name=re.compile("^Timeline")).get_by_role("button")
    expect(steps).to_have_count(2)
    keys = opened.page.keyboard
    panel.get_by_role("slider", name="Look at step").focus()
    keys.press("Tab")
    expect(steps.nth(1)).to_be_focused()
    keys.press("ArrowLeft")
    expect(steps.nth(0)).to_be_focused()
    keys.press("Enter")
    panel.settled()
    expect(panel.root).to_contain_text("Step 1 of 2")
    expect(steps.nth(0)).to_be_focused()
    expect(steps.nth(0)).to_have_attribute("aria-current", "step")
    keys.press("Tab")
    expect(panel.get_by_text("What the letters mean")).to_be_focused()
    panel.get_by_label("Prompts, one a line").fill("How do I count to two?")
    panel.press("Submit")
    expect(panel.get_by_role("row", name=re.compile("count to two"))).to_be_visible()
    panel.press("Play")
    expect(panel.get_by_role("button", name="Pause")).to_be_visible()
    panel.press("Pause")
    expect(panel.get_by_role("button", name="Play")).to_be_visible()
    assert panel.nameless() == []
    panel.pictures("monitor")


def test_two_engines_chat_and_stop_in_the_middle(opened):
    panel = opened.panel("chat")
    message = panel.get_by_label("Your message")
    message.fill("How do I count to nine in French?")
    message.press("Enter")
    stop = panel.get_by_role("button", name="Stop")
    expect(stop).to_be_enabled(timeout=LONG)
    answers = panel.locator(".answer")
    expect(answers).to_have_count(2)
    for place in range(2):
        expect(answers.nth(place)).to_contain_text("trois", timeout=LONG, ignore_case=True)
    stop.click()
    panel.settled()
    for place in range(2):
        expect(answers.nth(place).locator(".facts")).to_contain_text("stopped", timeout=LONG)
    expect(stop).to_be_disabled()
    texts = [answers.nth(place).locator(".text").inner_text() for place in range(2)]
    opened.page.wait_for_timeout(500)
    assert texts == [answers.nth(place).locator(".text").inner_text() for place in range(2)], "nothing comes after Stop"
    answers.first.locator("[data-act=token]").nth(2).click()
    panel.settled()
    expect(panel.get_by_text("what could have come")).to_be_visible()
    assert panel.nameless() == []
    panel.pictures("chat")
    opened.python("chat.close(); monitor.close()")
