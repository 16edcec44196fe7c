"""`llmlab notebook`: run notebooks as scripts, and make pages of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmlab.cli.one_line import OneLineErrors

app = typer.Typer(
    cls=OneLineErrors,
    help="Run notebooks as scripts, and make pages of them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def root() -> None:
    pass


@app.command()
def run(
    notebook: Annotated[Path, typer.Argument(help="An `.ipynb` file, or the `.py` of one.")],
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME=VALUE",
            help="In place of what the notebook's `parameters` cell says.",
            show_default="none",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the engine: the notebook's parameter `output`.",
            show_default="the notebook's",
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the executed notebook as this file.", show_default="no")
    ] = None,
) -> None:
    """Execute a notebook from top to bottom with other parameters, in the current folder.

    A line says which cell runs, what it prints and how long it took. Where a cell fails, the error names it; exit code 2.

    **Example:** `llmlab notebook run notebooks/01_checkpoint_to_engine.ipynb -p model=tinychat -p precision=int4_rtn -o engines/x`
    """
    from llmlab.errors import InputError
    from llmlab.notebook.run import run_notebook
    from llmlab.runtime.manifest import MANIFEST

    given = dict(map(_parameter, parameters or ()))
    if output is not None:
        if (output / MANIFEST).exists():
            raise InputError(f"{output} holds an engine: remove it, or choose another folder")
        given["output"] = str(output)
    run_notebook(notebook, given, save=save, tell=lambda line: print(line, flush=True))
    if output is not None and not (output / MANIFEST).is_file():
        raise InputError(f"{notebook.name} ran, and wrote no engine to {output}: does it use its parameter `output`?")


@app.command()
def export(
    notebook: Annotated[Path, typer.Argument(help="An `.ipynb` file that was saved with its outputs.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page.", show_default="beside the notebook")
    ] = None,
) -> None:
    """Write a notebook as one page of HTML that needs no network.

    **Example:** `llmlab notebook export notebooks/01_checkpoint_to_engine.ipynb -o walk.html`
    """
    from llmlab.notebook.export import export_html

    print(export_html(notebook, output))


def _parameter(given: str) -> tuple[str, Any]:
    """`name=value`, the value read as YAML reads a number, a truth or a text. Raises InputError."""
    import yaml

    from llmlab.errors import InputError

    name, equals, text = given.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f"parameter is {given!r}, expected NAME=VALUE such as model=tinychat")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return name, value if isinstance(value, (bool, int, float, str)) else None if value is None and text in (
        "null",
        "~",
    ) else text
