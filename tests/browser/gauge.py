"""A panel with every kind of control, for the tests of what all panels share. The notebook of those tests imports it."""

from __future__ import annotations

import threading
import time

from llmlab.errors import InputError
from llmlab.widgets.markup import button, checkbox, control, copies, h, select, slider
from llmlab.widgets.panel import Panel


class Gauge(Panel):
    regions = ("bar", "typed", "tree", "log")
    name = "gauge"

    def __init__(self) -> None:
        super().__init__()
        self.count, self.size, self.kind, self.on = 0, 3.0, "a", False
        self.sent: list[str] = []
        self.unfolded: set[str] = set()
        self.lines = [f"line {n}" for n in range(40)]
        self.moves = 0
        self.stop = threading.Event()

    def title(self) -> str:
        return f"gauge at {self.count}"

    def draw_bar(self):
        return h(
            "div",
            h(
                "p",
                "count: ",
                h("b", self.count),
                f" · size {self.size:g} · kind {self.kind} · {'on' if self.on else 'off'}",
            ),
            h("p", "moves: ", h("i", self.moves)),
            h(
                "div",
                button("More", "add", "1", class_="main"),
                button("Refuse", "add", "-"),
                button("Once", "once", disabled=self.count > 100),
                button("Slow", "slow"),
                slider("Size", "size", 0, 10, self.size),
                select("Kind", "kind", [("a", "first"), ("b", "second")], self.kind),
                checkbox("On", "tick", self.on),
                copies("Copy", "copied <text>"),
                class_="bar",
            ),
        )

    def draw_typed(self):
        field = h(
            "textarea", name="text", aria_label="Message", data_draft="text", data_clears=True, data_enter=True, rows=2
        )
        warmth = h("label", "Warmth ", h("input", type="number", name="warmth", value=1, step=0.1, data_draft="warmth"))
        form = h("form", field, warmth, h("button", "Send", type="submit"), class_="bar live-only", **control("send"))
        search = h("input", type="search", aria_label="Search", value="", **control("search"))
        shift = slider("Shift", "shift", 0, 9, 0)
        return h(
            "div",
            form,
            shift,
            h("label", "Find ", search, class_="live-only"),
            h("ul", [h("li", line) for line in self.sent]),
        )

    def draw_tree(self):
        def row(key: str, level: int):
            return h(
                "div",
                key,
                role="treeitem",
                tabindex=0,
                aria_level=level,
                aria_expanded=str(key in self.unfolded).lower() if level == 1 else None,
                style=f"padding-left: {level * 12}px",
                **control("fold", key),
            )

        rows = []
        for name in ("one", "two", "three"):
            rows.append(row(name, 1))
            rows += [row(f"{name}.{n}", 2) for n in range(2)] if name in self.unfolded else []
        return h("div", rows, role="tree", aria_label="Tree", data_walk="column")

    def draw_log(self):
        lines = h(
            "div",
            [h("div", line) for line in self.lines],
            style="height: 100px; overflow: auto",
            data_scroll="log",
            data_follow=True,
        )
        fold = h("details", h("summary", "Unfold"), h("p", f"hidden {self.count}"), data_keep="fold")
        colours = [h("span", word, class_=word) for word in ("added", "removed", "changed", "badge")]
        table = h(
            "table",
            h("tr", h("th", "name"), h("th", "bytes", class_="number")),
            h("tr", h("td", "x"), h("td", 123, class_="number")),
        )
        circle = h(
            "svg",
            h("title", "a circle"),
            h("circle", cx=10, cy=10, r=8, fill="var(--ll-0)"),
            h("text", "text", x=24, y=14),
            viewBox="0 0 60 20",
            width=60,
            role="img",
        )
        return h("div", lines, fold, h("p", colours), table, circle)

    def on_add(self, key, value):
        if key == "-":
            raise InputError("'-' can't be added, expected a number: press More")
        self.count += int(key)
        return ["bar", "log"]

    def on_once(self, key, value):
        self.count = 1000
        return ["bar"]

    def on_slow(self, key, value):
        time.sleep(1)
        return ["bar"]

    def on_size(self, key, value):
        time.sleep(0.03)
        self.size, self.moves = min(float(value), 8.0), self.moves + 1
        return ["bar"]

    def on_shift(self, key, value):
        self.count = int(value)
        return ["bar"]

    def on_kind(self, key, value):
        self.kind = value
        return ["bar"]

    def on_tick(self, key, value):
        self.on = bool(value) and self.count < 100
        return ["bar"]

    def on_send(self, key, value):
        self.sent.append(f"{value['text']} at {value['warmth']}")
        return ["typed"]

    def on_search(self, key, value):
        self.sent = [f"found {value}"]
        return ["typed"]

    def on_fold(self, key, value):
        self.unfolded ^= {key}
        return ["tree"]

    def work(self, lines: int) -> None:
        """Add so many lines, about 20 a second, in a thread."""

        stop = self.stop

        def add() -> None:
            for _ in range(lines):
                if stop.wait(0.05):
                    return
                with self.lock:
                    if stop.is_set():
                        return
                    self.count += 1
                    self.lines.append(f"line {len(self.lines)}")
                self.refresh("bar", "typed", "log")

        threading.Thread(target=add, daemon=True).start()
