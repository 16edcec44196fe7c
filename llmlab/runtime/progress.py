"""The progress bar of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmlab.progress import make_bar
from llmlab.runtime.outputs import Delta


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[Delta], None]]:
    """A bar over `total` answers; yields a function that takes in each piece of an answer."""
    if not wanted:
        yield lambda delta: None
        return
    bar, remove = make_bar(total, unit="answer")
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
