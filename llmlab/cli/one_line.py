"""What a verb raises, as one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
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


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: the exporter's native code catches it and reports a failure of its own."""
    while error is not None:
        if "KeyboardInterrupt" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False
