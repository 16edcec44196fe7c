"""What all panels do in a page, on a panel that has every kind of control (gauge.py)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

CELLS = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom gauge import Gauge\ngauge = Gauge()\ngauge",
    "gauge",
)


@pytest.fixture(scope="module")
def opened(lab, server):
    lab.open(server.write("gauge.ipynb", *CELLS))
    lab.run_all()
    return lab


@pytest.fixture
def gauge(opened):
    """The first view of the panel, as it was made."""
    opened.python(
        "gauge.stop.set(); gauge.stop = type(gauge.stop)()\n"
        "with gauge.lock: fresh = Gauge(); vars(gauge).update({k: v for k, v in vars(fresh).items() if k not in ('lock', '_listeners')})\n"
        "gauge.refresh()"
    )
    view = opened.panel("gauge")
    expect(view.locator("b")).to_have_text("0")
    return view


def test_a_button_counts_in_every_view(gauge, opened):
    gauge.press("More")
    expect(gauge.locator("b")).to_have_text("1")
    expect(opened.panel("gauge", 1).locator("b")).to_have_text("1")
    opened.panel("gauge", 1).press("More")
    expect(gauge.locator("b")).to_have_text("2")
    assert 0 < gauge.latency < 5000


def test_an_error_is_an_alert_until_the_next_action(gauge):
    gauge.press("Refuse")
    expect(gauge.get_by_role("alert")).to_contain_text("press More")
    gauge.press("More")
    expect(gauge.get_by_role("alert")).to_have_count(0)


def test_a_slider_can_be_dragged_while_its_region_is_drawn_again(gauge, opened):
    bar = gauge.get_by_role("slider", name="Size")
    box = bar.bounding_box()
    mouse, across = opened.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + box["width"] * 0.3, across)
    mouse.down()
    for step in range(12):
        mouse.move(box["x"] + box["width"] * (0.3 + step * 0.03), across)
        time.sleep(0.03)
    mouse.up()
    gauge.settled()
    expect(bar).to_have_value("6")
    expect(gauge.locator("p", has_text="size 6")).to_be_visible()
    assert int(gauge.locator("i").inner_text()) >= 2


def test_a_slider_shows_what_python_made_of_it(gauge):
    bar = gauge.get_by_role("slider", name="Size")
    bar.focus()
    bar.press("End")
    gauge.settled()
    expect(bar).to_have_value("8")
    expect(bar).to_be_focused()
    bar.press("ArrowLeft")
    gauge.settled()
    expect(bar).to_have_value("7")


def test_a_slider_stays_where_its_own_region_is_not_drawn_again(gauge):
    bar = gauge.get_by_role("slider", name="Shift")
    bar.focus()
    bar.press("End")
    gauge.settled()
    expect(gauge.locator("b")).to_have_text("9")
    expect(bar).to_have_value("9")


def test_ticks_and_choices_show_what_python_says(gauge, opened):
    gauge.get_by_role("checkbox").click()
    gauge.settled()
    expect(gauge.locator("p", has_text="· on")).to_be_visible()
    gauge.get_by_label("Kind").select_option("b")
    gauge.settled()
    expect(gauge.locator("p", has_text="kind b")).to_be_visible()
    expect(opened.panel("gauge", 1).get_by_label("Kind")).to_have_value("b")
    expect(opened.panel("gauge", 1).get_by_role("checkbox")).to_be_checked()
    gauge.press("Once")
    gauge.get_by_role("checkbox").click()
    gauge.settled()
    gauge.get_by_role("checkbox").click()  # refused from now on
    gauge.settled()
    expect(gauge.get_by_role("checkbox")).not_to_be_checked()


def test_typed_text_stays_while_everything_is_drawn_again(gauge, opened):
    field = gauge.get_by_label("Message")
    field.click()
    opened.python("gauge.work(50)")
    field.press_sequentially("hello there", delay=60)
    expect(field).to_be_focused()
    expect(field).to_have_value("hello there")
    field.press("Shift+Enter")
    field.press_sequentially("you")
    field.press("Enter")
    gauge.settled()
    expect(gauge.locator("li")).to_have_text("hello there\nyou at 1")
    expect(field).to_have_value("")
    expect(field).to_be_focused()


def test_a_search_keeps_its_text_and_sends_the_newest(gauge):
    field = gauge.get_by_label("Search")
    field.click()
    field.press_sequentially("query", delay=20)
    gauge.settled()
    expect(gauge.locator("li")).to_have_text("found query")
    expect(field).to_have_value("query")
    expect(field).to_be_focused()


def test_the_focus_stays_and_goes_to_the_region_when_its_control_is_gone(gauge, opened):
    more = gauge.get_by_role("button", name="More")
    more.focus()
    more.press("Enter")
    gauge.settled()
    expect(more).to_be_focused()
    once = gauge.get_by_role("button", name="Once")
    once.focus()
    once.press("Space")
    gauge.settled()
    expect(once).to_be_disabled()
    assert gauge.evaluate("(root) => root.contains(document.activeElement)"), "the keyboard's place in the page is lost"


def test_scrolled_places_stay_and_a_log_at_its_end_follows(gauge, opened):
    log = gauge.locator("[data-scroll=log]")
    log.evaluate("(e) => e.scrollTo(0, 40)")
    gauge.press("More")
    assert log.evaluate("(e) => e.scrollTop") == 40
    log.evaluate("(e) => e.scrollTo(0, e.scrollHeight)")
    opened.python("gauge.work(6)")
    expect(log).to_contain_text("line 43")
    opened.page.wait_for_function("(e) => e.scrollHeight - e.scrollTop - e.clientHeight < 2", arg=log.element_handle())


def test_unfolded_details_stay_unfolded(gauge):
    gauge.get_by_text("Unfold").click()
    gauge.press("More")
    expect(gauge.get_by_text("hidden 1")).to_be_visible()


def test_arrow_keys_walk_and_unfold(gauge, opened):
    rows = gauge.get_by_role("treeitem")
    rows.first.focus()
    keys = opened.page.keyboard
    keys.press("ArrowDown")
    expect(rows.nth(1)).to_be_focused()
    keys.press("ArrowRight")
    gauge.settled()
    expect(rows).to_have_count(5)
    expect(rows.nth(1)).to_be_focused()
    expect(rows.nth(1)).to_have_attribute("aria-expanded", "true")
    keys.press("ArrowRight")
    expect(rows.nth(2)).to_be_focused()
    keys.press("ArrowLeft")
    expect(rows.nth(1)).to_be_focused()
    keys.press("End")
    expect(rows.last).to_be_focused()
    keys.press("Home")
    keys.press("ArrowDown")
    keys.press("Enter")
    gauge.settled()
    expect(rows).to_have_count(3)


def test_keys_in_a_panel_are_no_shortcuts_of_the_notebook(gauge, opened):
    cells = opened.page.locator(".jp-Notebook .jp-CodeCell")
    before = cells.count()
    gauge.get_by_role("treeitem").first.focus()
    for key in ("a", "b", "d", "d", "x"):
        opened.page.keyboard.press(key)
    assert cells.count() == before


def test_copy_puts_the_text_on_the_clipboard(gauge, opened):
    button = gauge.locator("[data-copy]")
    button.click()
    expect(button).to_have_text("copied")
    assert opened.page.evaluate("() => navigator.clipboard.readText()") == "copied <text>"
    expect(button).to_have_text("Copy")


def test_actions_are_answered_beside_a_running_cell(gauge, opened):
    opened.page.evaluate(
        "() => { window.sleeping = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code: 'import time; time.sleep(3)' }).done }"
    )
    start = time.monotonic()
    gauge.press("More")
    expect(gauge.locator("b")).to_have_text("1")
    assert time.monotonic() - start < 2.5
    opened.page.evaluate("() => window.sleeping")


def test_a_thread_draws_while_a_cell_runs(gauge, opened):
    opened.python("gauge.work(12)\nimport time; time.sleep(1)")
    assert int(gauge.locator("b").inner_text()) > 3


def test_it_says_when_no_answer_comes(gauge):
    gauge.get_by_role("button", name="Slow").click()
    expect(gauge.root).to_have_attribute("data-slow", "")
    gauge.settled()
    assert gauge.root.get_attribute("data-slow") is None


def test_every_control_has_a_name(gauge):
    assert gauge.nameless() == []
    gauge.evaluate("(root) => root.querySelector('[role=img] title').remove()")
    assert len(gauge.nameless()) == 1, "the check sees one that has none"


def test_wide_and_narrow_light_and_dark(gauge):
    gauge.press("Refuse")
    gauge.pictures("gauge")
