"""What a verb raises, and Ctrl-C, as one line and an exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from llmlab.errors import LlmlabError


class OneLineErrors(TyperGroup):
    """Turns what a verb raises into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # the reader left, as with `| head`; typer ends quietly
        except (LlmlabError, OSError) as error:
            if _interrupted(error):
                raise typer.Exit(130) from None
            if os.environ.get("LLMLAB_DEBUG") == "1":
                traceback.print_exc()
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"llmlab: {message}", file=sys.stderr)
            raise typer.Exit(2) from error


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the program here and now, with exit code 130. For work that writes nothing: torch's import and its
    exporter abort the process if an exception comes out of a signal at the wrong moment."""

    def leave(*_: object) -> None:
        Console(stderr=True).show_cursor()
        atexit._run_exitfuncs()  # temporary folders go
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: the exporter's native code catches it and reports a failure of its own."""
    while error is not None:
        if "KeyboardInterrupt" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False
