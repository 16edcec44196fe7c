"""Progress bars: on a terminal or in a notebook, and nowhere else; or what a panel watches, which can also stop the work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

_WORTH_IT = 256 << 20  # bytes; fewer are written before a bar is drawn


@dataclass(frozen=True)
class Progress:
    """How far something is that shows a bar otherwise."""

    what: str
    done: float
    total: float
    """0 where it isn't known."""
    unit: str


Watcher = Callable[[Progress | str], object]
"""Takes in the stage that begins, as text, or how far it is. Raises KeyboardInterrupt to stop the work, which then leaves nothing behind."""

_watcher: ContextVar[Watcher | None] = ContextVar("llmlab_watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """What this thread does in here draws no bars: it tells `watcher`, which may stop it."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def begins(stage: str) -> None:
    """A stage of the work begins; for whoever watches it."""
    if (watcher := _watcher.get()) is not None:
        watcher(stage)


class _WatchedBar:
    """Takes a bar's calls and tells a watcher."""

    disable = True

    def __init__(self, watcher: Watcher, total: float, style: dict[str, Any]) -> None:
        self._watcher, self.total, self.n = watcher, total, 0.0
        self._what, self._unit = str(style.get("desc", "")), str(style.get("unit", ""))

    def update(self, done: float = 1) -> None:
        self.n += done
        self._tell()

    def set_description_str(self, text: str) -> None:
        self._what = text
        self._tell()

    def set_postfix_str(self, text: str) -> None:
        self._tell()

    def refresh(self) -> None:
        self._tell()

    def _tell(self) -> None:
        self._watcher(Progress(self._what, self.n, self.total or 0, self._unit))


@contextmanager
def byte_bar(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar over `total` bytes, if they are many; yields a function that takes in how many more are done."""
    if total < _WORTH_IT and _watcher.get() is None:
        yield lambda done: None
        return
    bar, remove = make_bar(total, desc=what, unit="B", unit_scale=True)
    try:
        yield bar.update
    finally:
        remove()


@contextmanager
def stage_bar(what: str, stages: Sequence[str], wanted: bool) -> Iterator[Callable[[str], None]]:
    """A bar over the stages of what takes long; yields a function that takes in which of them begins."""
    if not wanted and _watcher.get() is None:
        yield lambda stage: None
        return
    bar, remove = make_bar(len(stages), desc=what, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}")

    def next_one(stage: str) -> None:
        bar.n = stages.index(stage)
        bar.set_description_str(f"{what}: {stage}")

    try:
        yield next_one
    finally:
        remove()


def make_bar(total: int, **style: Any) -> tuple[Any, Callable[[], None]]:
    """A tqdm bar where someone can see it (else one that draws nothing), and what removes it."""
    if (watcher := _watcher.get()) is not None:
        return _WatchedBar(watcher, total, style), lambda: None
    return _notebook_bar(total, style) if _in_notebook() else _terminal_bar(total, style)


def _in_notebook() -> bool:
    """Whether a kernel runs this code. That ipykernel is imported says nothing: whatever starts kernels does that."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel") and find_spec("ipywidgets") is not None


def _terminal_bar(total: int, style: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    from tqdm import tqdm

    bar = tqdm(total=total, disable=not sys.stderr.isatty(), leave=False, **style)
    return bar, bar.close


def _notebook_bar(total: int, style: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    from IPython.display import display
    from tqdm.notebook import tqdm

    bar = tqdm(total=total, display=False, leave=False, **style)
    shown = display(bar.container, display_id=True)

    def remove() -> None:
        bar.close()
        if shown is not None:  # else a dead widget stays in the saved notebook
            shown.update({"text/plain": ""}, raw=True)

    return bar, remove
