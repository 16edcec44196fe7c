"""Run a notebook with parameters: through papermill, a line for each cell while it runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmlab.errors import InputError, LlmlabError, nearest, require
from llmlab.files import write_text

_LIMIT = 64 << 20  # bytes of a notebook
_SUFFIXES = (".ipynb", ".py")


class NotebookError(LlmlabError):
    """A cell failed; the message says which, and the last line of its traceback."""


def run_notebook(
    path: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    save: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path | None:
    """Execute the notebook `path` (.ipynb, or .py as jupytext writes it) in the current folder.

    parameters: take the place of what the cell tagged `parameters` assigns.
    save: write the executed notebook there; also one that failed, up to the cell that did.
    tell: called with a line when a cell begins, for what it prints, and when it has ended.
    Returns the path of the executed notebook, if it was asked for. Raises InputError for what is no notebook or a parameter that it
    doesn't have, NotebookError where a cell fails. Ctrl-C stops the kernel.
    """
    papermill = require("papermill", "notebook")
    source = Path(path)
    given = dict(parameters or {})
    with tempfile.TemporaryDirectory(prefix="llmlab-notebook-") as folder:
        opened = as_ipynb(source, Path(folder))
        _check(source, given, papermill.inspect_notebook(str(opened)))
        result = Path(folder) / "executed.ipynb"
        engine = _engine(papermill, tell or (lambda line: None))
        try:
            papermill.execute_notebook(
                str(opened), str(result), given, engine_name=engine, kernel_name="python3", progress_bar=False
            )
        except papermill.PapermillExecutionError as failed:
            first = failed.source.strip().partition("\n")[0]
            value = str(failed.evalue).partition("\n")[0]
            raise NotebookError(
                f"{source.name}: cell {failed.exec_count} failed ({first}): {failed.ename}: {value}"
            ) from failed
        finally:
            if save is not None and result.is_file():
                write_text(Path(save), result.read_text("utf-8"))
    return None if save is None else Path(save)


def notebook_parameters(path: str | Path) -> dict[str, str]:
    """What a notebook's `parameters` cell assigns: names with their values as text."""
    papermill = require("papermill", "notebook")
    with tempfile.TemporaryDirectory(prefix="llmlab-notebook-") as folder:
        found = papermill.inspect_notebook(str(as_ipynb(Path(path), Path(folder))))
    return {name: str(entry["default"]) for name, entry in found.items()}


def as_ipynb(source: Path, folder: Path) -> Path:
    """A copy of a notebook that papermill can open. Raises InputError."""
    if source.suffix not in _SUFFIXES or not source.is_file():
        raise InputError(f"{source}: no such notebook; expected an .ipynb file, or the .py of one")
    if source.stat().st_size > _LIMIT:
        raise InputError(f"{source} has {source.stat().st_size:,} bytes, expected at most {_LIMIT:,}")
    jupytext, nbformat = require("jupytext", "notebook"), require("nbformat", "notebook")
    try:
        notebook = jupytext.read(source)
        nbformat.validate(notebook)
    except (ValueError, KeyError, AttributeError, TypeError, nbformat.ValidationError) as problem:
        raise InputError(f"{source} is no notebook: {str(problem).partition(chr(10))[0]}") from problem
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    opened = folder / "notebook.ipynb"
    nbformat.write(notebook, opened)
    return opened


def _check(source: Path, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            has = nearest(name, known) if known else "it has no cell tagged `parameters`"
            raise InputError(f"{source.name} has no parameter {name!r} ({has})")


def _engine(papermill: Any, tell: Callable[[str], None]) -> str:
    """The name of a papermill engine that tells of each cell."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Telling(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            _tell_of_cells(nb_man, tell)
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("llmlab", Telling)
    return "llmlab"


def _tell_of_cells(manager: Any, tell: Callable[[str], None]) -> None:
    """Make a papermill manager say what it begins and ends."""
    cells = [cell for cell in manager.nb.cells if cell.cell_type == "code"]
    starts, completes = manager.cell_start, manager.cell_complete
    began: dict[int, float] = {}

    def start(cell: Any, cell_index: int | None = None, **options: Any) -> None:
        if cell.cell_type == "code":
            began[id(cell)] = time.perf_counter()
            first = next((line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")), "")
            tell(f"[{_place(cells, cell)}/{len(cells)}] {first.strip()}")
        starts(cell, cell_index, **options)

    def complete(cell: Any, cell_index: int | None = None, **options: Any) -> None:
        completes(cell, cell_index, **options)
        if id(cell) in began:
            for output in cell.get("outputs", ()):
                if output.output_type == "stream" and output.name == "stdout":
                    tell("\n".join(f"    {line}" for line in output.text.rstrip().splitlines()))
            tell(f"    {time.perf_counter() - began.pop(id(cell)):.1f} s")

    manager.cell_start, manager.cell_complete = start, complete


def _place(cells: list[Any], cell: Any) -> int:
    return next((i for i, other in enumerate(cells, start=1) if other is cell), 0)
