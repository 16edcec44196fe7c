"""Progress bars: on a terminal or in a notebook, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_WORTH_IT = 256 << 20  # bytes; fewer are written before a bar is drawn


@contextmanager
def byte_bar(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar over `total` bytes, if they are many; yields a function that takes in how many more are done."""
    if total < _WORTH_IT:
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
    if not wanted:
        yield lambda stage: None
        return
    bar, remove = make_bar(len(stages), desc=what, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}")

    def begins(stage: str) -> None:
        bar.n = stages.index(stage)
        bar.set_description_str(f"{what}: {stage}")

    try:
        yield begins
    finally:
        remove()


def make_bar(total: int, **style: Any) -> tuple[Any, Callable[[], None]]:
    """A tqdm bar where someone can see it (else one that draws nothing), and what removes it."""
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
