"""What all panels are: named regions that draw themselves, and actions that say which regions they changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from markupsafe import Markup

from llmlab.errors import LlmlabError
from llmlab.files import write_text
from llmlab.widgets.markup import h

CSS = Path(__file__).with_name("panel.css")

Listener = Callable[[dict[str, str]], None]


class Panel:
    """An instrument panel: plain data that draws itself, in a live page or as a picture.

    A subclass has a method `draw_NAME() -> Markup` for each name in `regions`, and a method `on_ACT(key, value)` for each
    action that its controls send (llmlab/widgets/markup.py); it returns the regions to draw again, None for all of
    them. An LlmlabError that it raises is shown as a line in the panel. Actions come one at a time, on any thread.
    What goes on by itself (a worker thread) changes the data under `self.lock` and calls `refresh`.
    """

    regions: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = "panel"
    """Its CSS class, and how tests find it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.problem = ""
        """The line about what the last action could not do."""
        self.is_static = False
        """Whether it is being drawn as a picture, where what would need a click is shown at once."""
        self._listeners: list[Listener] = []

    def title(self) -> str:
        """One line of text: what this panel shows. It is the picture's caption and the plain form's first line."""
        return self.name

    def act(self, act: str, key: str = "", value: Any = None) -> dict[str, str]:
        """Carry out one action as the page would; the HTML of the regions that it changed. Unknown ones change nothing.

        key: says which row or button it was; value: of a slider, tick, choice or text, a dictionary of a form's fields.
        """
        handler = getattr(self, f"on_{act}", None)
        if handler is None or not act.isidentifier():
            return {}
        with self.lock:
            before, self.problem = self.problem, ""
            try:
                changed: Iterable[str] | None = handler(key, value)
            except LlmlabError as error:
                self.problem, changed = str(error), ()
            drawn = self.draw(self.regions if changed is None else changed)
            if before or self.problem:
                drawn["problem"] = self._draw_problem()
            self._tell(drawn)
        return drawn

    def refresh(self, *regions: str) -> None:
        """Draw these regions again (all without any) in every page that shows this panel. From any thread."""
        if self._listeners:
            with self.lock:
                self._tell(self.draw(regions or self.regions))

    def draw(self, regions: Iterable[str]) -> dict[str, str]:
        """HTML by region."""
        return {name: str(getattr(self, f"draw_{name}")()) for name in regions}

    def html(self) -> str:
        """The whole panel as it is now, without a stylesheet."""
        with self.lock:
            drawn = {**self.draw(self.regions), "problem": self._draw_problem()}
        parts = [h("div", Markup(drawn[name]), data_region=name, class_=f"ll-{name}") for name in drawn]
        return str(h("section", parts, class_=f"llmlab {self.name}", aria_label=self.title()))

    def static(self) -> str:
        """The panel as a picture: HTML with its stylesheet and without a script; controls are hidden."""
        with self.lock:
            self.is_static = True
            try:
                return f"<style>{CSS.read_text('utf-8')}</style>{self.html()}"
            finally:
                self.is_static = False

    def save(self, path: str | Path) -> Path:
        """Write the picture as a page of its own, which needs no network."""
        head = Markup("<meta charset='utf-8'><meta name='viewport' content='width=device-width'>")
        page = h(
            "html", head, h("title", self.title()), h("body", Markup(self.static()), class_="llmlab-page"), lang="en"
        )
        write_text(Path(path), f"<!doctype html>{page}")
        return Path(path)

    def listen(self, listener: Listener) -> None:
        """Call `listener` with HTML by region whenever regions are drawn again.

        It is called with `lock` held, so that what was drawn last is told last; it must not wait for another thread.
        """
        self._listeners.append(listener)

    def close(self) -> None:
        """Stop what the panel runs. A panel that runs something overrides this; it may be called twice."""

    def to_dict(self) -> dict[str, Any]:
        """What the panel shows, as plain data."""
        return {"panel": self.name, "title": self.title()}

    def __str__(self) -> str:
        return self.title()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title()}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": str(self), "text/html": self.static()}
        if find_spec("anywidget") is not None and find_spec("IPython") is not None:
            from llmlab.widgets.live import live_view

            bundle |= live_view(self)
        return bundle

    def _draw_problem(self) -> str:
        return str(h("div", self.problem, role="alert")) if self.problem else ""

    def _tell(self, drawn: dict[str, str]) -> None:
        if drawn:
            for listener in tuple(self._listeners):
                listener(drawn)
