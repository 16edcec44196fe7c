"""`llmlab script`: the Python script that rebuilds an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmlab.cli import options


def script(
    engine: options.EngineFolder,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="print it")
    ] = None,
) -> None:
    """Print the Python script that rebuilds an engine and checks that its files are the same.

    **Example:** `llmlab script engines/tinychat > rebuild.py && python rebuild.py engines/again`
    """
    from llmlab.files import write_text
    from llmlab.script import script as text_of

    text = text_of(engine)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
