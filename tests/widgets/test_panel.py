"""What all panels do: draw regions, carry out actions, show errors as a line, escape what strangers wrote."""

import threading
from contextvars import ContextVar, copy_context
from pathlib import Path

import pytest

from llmlab.errors import InputError
from llmlab.widgets.markup import button, h, slider
from llmlab.widgets.panel import Panel


class Counter(Panel):
    regions = ("count", "other")
    name = "counter"

    def __init__(self, label: str = "") -> None:
        super().__init__()
        self.count, self.label = 0, label

    def draw_count(self):
        return h("p", self.label, self.count, button("more", "add", "1"))

    def draw_other(self):
        return slider("size", "size", 0, 10, self.count)

    def on_add(self, key, value):
        if key == "-":
            raise InputError("key is '-', expected a number: press another button")
        self.count += int(key)
        return ["count"]

    def on_reset(self, key, value):
        self.count = 0


def test_an_action_draws_the_regions_that_it_changed():
    panel, heard = Counter(), []
    panel.listen(heard.append)
    assert set(panel.act("add", "3")) == {"count"}
    assert panel.count == 3 and "3" in heard[0]["count"]
    assert set(panel.act("reset")) == {"count", "other"}


@pytest.mark.parametrize("act", ["missing", "draw_count", "__init__", ""])
def test_an_unknown_action_changes_nothing(act):
    assert Counter().act(act) == {}


def test_bad_input_is_one_line_in_the_panel_and_gone_with_the_next_action():
    panel = Counter()
    drawn = panel.act("add", "-")
    assert set(drawn) == {"problem"} and "expected a number" in drawn["problem"]
    assert "expected a number" in panel.html()
    assert panel.act("add", "1")["problem"] == ""


def test_what_strangers_wrote_is_text():
    html = Counter("<img src=x onerror=alert(1)>\x1b").html()
    assert "<img" not in html and "&lt;img" in html and "\x1b" not in html
    assert '"&#34;' in str(h("p", title='"'))


def test_attributes_and_children():
    assert h("p", None, 1, ["a", ["<"]], class_="x", data_key=0, hidden=True, title=None) == (
        '<p class="x" data-key="0" hidden>1a&lt;</p>'
    )
    assert h("br") == "<br>"


def test_a_picture_has_its_style_and_no_script(tmp_path: Path):
    panel = Counter("hello")
    page = panel.save(tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "hello" in page and "<style>" in page
    assert "<script" not in page and "http" not in page
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match="can't be written"):
        panel.save(tmp_path / "none" / "page.html")


def test_refresh_tells_pages_from_any_thread():
    panel, heard = Counter(), []
    panel.refresh("count")
    panel.listen(heard.append)
    panel.refresh("count")
    assert [set(drawn) for drawn in heard] == [{"count"}]


def test_what_was_drawn_last_is_told_last():
    """A thread that drew and then was held up must not put its older picture over a newer one."""
    panel, heard, drawn, go = Counter(), [], threading.Event(), threading.Event()

    def hear(regions: dict[str, str]) -> None:
        if not heard and threading.current_thread() is slow:
            drawn.set()
            go.wait(0.5)
        heard.append(regions["count"])

    panel.listen(hear)
    slow = threading.Thread(target=panel.refresh, args=("count",))
    slow.start()
    assert drawn.wait(10)
    panel.act("add", "2")
    go.set()
    slow.join()
    assert heard == [str(Counter().draw_count()), str(panel.draw_count())]


def test_regions_are_sent_from_where_the_page_asked_last():
    """The kernel sends the next action to where the last message came from: never back to a cell that runs."""
    pytest.importorskip("anywidget")
    from llmlab.widgets.live import LivePanel

    where, panel, sent = ContextVar("where", default="a thread"), Counter(), []
    live = LivePanel(panel)
    live.send = lambda message, buffers=None: sent.append((where.get(), *message))

    def receive(place: str, message: dict[str, object]) -> None:
        copy_context().run(lambda: (where.set(place), live._handle_custom_msg(message, [])))

    panel.refresh("count")
    receive("a cell", {"open": "v"})
    receive("a subshell", {"act": "add", "key": "1", "number": 1})
    panel.refresh("count")
    receive("a subshell", {"closed": "v"})
    panel.refresh("count")
    assert sent == [
        ("a cell", "whole"),
        ("a subshell", "regions"),
        ("a subshell", "done"),
        ("a subshell", "regions"),
    ]


def test_without_a_kernel_the_bundle_is_the_picture():
    assert set(Counter()._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_the_live_panel_answers_its_page():
    pytest.importorskip("anywidget")
    from llmlab.widgets.live import LivePanel

    panel = Counter()
    live, sent = LivePanel(panel), []
    live.send = lambda message, buffers=None: sent.append(message)
    for message in ({"open": True}, {"act": "add", "key": "2", "number": 7}, {"act": 1, "number": 8}, "nonsense"):
        live._handle_custom_msg(message, [])
    assert ["whole" in sent[0], sent[1].keys(), sent[2], sent[3]] == [True, {"regions"}, {"done": 7}, {"done": 8}]
    assert panel.count == 2
