"""The bridge between a panel and a notebook's page: actions come in, regions that were drawn again go out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmlab.errors import require

if TYPE_CHECKING:
    import anywidget
    import traitlets
else:
    anywidget = require("anywidget", "notebook")
    traitlets = require("traitlets", "notebook")

_HERE = Path(__file__).parent


class Shown(Protocol):
    """What the page asks of a panel (llmlab/widgets/panel.py)."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def html(self) -> str: ...

    def act(self, act: str, key: str = "", value: Any = None) -> dict[str, str]: ...

    def listen(self, listener: Callable[[dict[str, str]], None]) -> None: ...


class LivePanel(anywidget.AnyWidget):
    """Shows one panel. The page asks for the whole panel when it opens, since a page can open later or again."""

    _esm = "".join((_HERE / name).read_text("utf-8") for name in ("morph.js", "panel.js"))
    _css = (_HERE / "panel.css").read_text("utf-8")
    html = traitlets.Unicode("").tag(sync=True)

    def __init__(self, panel: Shown) -> None:
        super().__init__(html=panel.html())
        self._panel = panel
        self._open: set[str] = set()
        self._asked: Context | None = None
        self.on_msg(self._receive)
        panel.listen(self._draw)

    def _draw(self, drawn: dict[str, str]) -> None:
        # A kernel sends the page's next action to where its last message came from: it must not wait behind a running
        # cell because a cell, or a thread that a cell started, drew last. So all come from where the page asked last.
        if self._open and self._asked:
            self._asked.copy().run(self.send, {"regions": drawn})

    def _receive(self, _: Any, message: Any, buffers: Any) -> None:
        if not isinstance(message, dict):
            return
        self._asked = copy_context()
        if opened := message.get("open"):
            self._open.add(str(opened))
            with self._panel.lock:  # what is drawn from now on comes behind it
                self.send({"whole": self._panel.html()})
            return
        if closed := message.get("closed"):
            self._open.discard(str(closed))
            return
        self._panel.act(str(message.get("act", "")), str(message.get("key", "")), message.get("value"))
        self.send({"done": message.get("number")})


def live_view(panel: Shown) -> dict[str, Any]:
    """The part of a display bundle that shows `panel` live; nothing where no kernel runs."""
    from IPython import get_ipython

    if not hasattr(get_ipython(), "kernel"):
        return {}
    shown: Any = LivePanel(panel)._repr_mimebundle_()
    bundle = shown[0] if isinstance(shown, tuple) else shown
    return {key: value for key, value in (bundle or {}).items() if key.startswith("application/")}
