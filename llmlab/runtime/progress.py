"""The progress bar of a batch: on a terminal or in a notebook, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from llmlab.runtime.outputs import Delta


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[Delta], None]]:
    """A bar over `total` answers; yields a function that takes in each piece of an answer."""
    if not wanted:
        yield lambda delta: None
        return
    bar, remove = _notebook_bar(total) if _in_notebook() else _terminal_bar(total)
    tokens = 0

    def advance(delta: Delta) -> None:
        nonlocal tokens
        tokens += len(delta.token_ids)
        if delta.finish_reason is not None and not bar.disable:
            seconds = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s" if seconds else "", refresh=False)
            bar.update(1)

    try:
        yield advance
    finally:
        remove()


def _in_notebook() -> bool:
    """Whether a kernel runs this code. That ipykernel is imported says nothing: whatever starts kernels does that."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel") and find_spec("ipywidgets") is not None


def _terminal_bar(total: int) -> tuple[Any, Callable[[], None]]:
    from tqdm import tqdm

    bar = tqdm(total=total, disable=not sys.stderr.isatty(), unit="answer", leave=False)
    return bar, bar.close


def _notebook_bar(total: int) -> tuple[Any, Callable[[], None]]:
    from IPython.display import display
    from tqdm.notebook import tqdm

    bar = tqdm(total=total, display=False, unit="answer", leave=False)
    shown = display(bar.container, display_id=True)

    def remove() -> None:
        bar.close()
        if shown is not None:  # else a dead widget stays in the saved notebook
            shown.update({"text/plain": ""}, raw=True)

    return bar, remove
