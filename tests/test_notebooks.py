"""Notebooks as they lie in the repository. That they run is for nbmake to show, in `make test`."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PATHS_OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|root|Users|tmp|work|var|opt)/")

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_pair_agrees(path: Path) -> None:
    written = jupytext.read(path.with_suffix(".py"))
    assert cells(written) == cells(read(path)), f"run `make notebooks`: {path.name} and its .py differ"
    written.cells[0].source += "!"
    assert cells(written) != cells(read(path)), "the comparison sees one character"


def test_saved_as_it_ran_from_top_to_bottom(path: Path) -> None:
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds and len(kinds) > len(code) / 2
    noise = [output.text for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    assert noise == [], "a stranger's first notebook has no warnings in it"


def test_nothing_in_it_names_the_machine_that_ran_it(path: Path) -> None:
    assert not PATHS_OF_A_MACHINE.search(path.read_text(encoding="utf-8"))
    assert PATHS_OF_A_MACHINE.search("engine in /home/someone/engines"), "the pattern finds one"
    assert set(read(path).metadata) <= {"kernelspec", "language_info"}, "no widget state, no timings"


def test_its_tables_and_pictures_are_there_without_javascript(path: Path) -> None:
    html = [
        o.data["text/html"] for c in read(path).cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})
    ]
    assert any("<table" in page for page in html)
    for page in html:
        assert "<script" not in page and "http" not in page
