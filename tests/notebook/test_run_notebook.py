"""Notebooks run as scripts: parameters, what is told meanwhile, and what fails."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from llmlab.cli.app import app
from llmlab.errors import InputError
from llmlab.notebook.run import NotebookError, notebook_parameters, run_notebook

SOURCE = """\
# %% tags=["parameters"]
model = "tinychat"
count = 2

# %%
# a comment
print(f"{model} {count * 2}")

# %%
assert count < 10, f"{count} is too many\\nand more"
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SOURCE)
    return path


def test_parameters_take_the_place_of_the_notebooks(notebook: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    saved = run_notebook(notebook, {"count": 4}, save=tmp_path / "done.ipynb", tell=lines.append)
    assert saved == tmp_path / "done.ipynb" and "    tinychat 8" in lines
    assert [line for line in lines if line.startswith("[")][-2:] == [
        '[3/4] print(f"{model} {count * 2}")',
        '[4/4] assert count < 10, f"{count} is too many\\nand more"',
    ]
    assert nbformat.read(saved, as_version=4).cells[-2].outputs[0].text == "tinychat 8\n"


def test_a_cell_that_fails_is_named_and_what_ran_is_kept(notebook: Path, tmp_path: Path) -> None:
    with pytest.raises(NotebookError) as failed:
        run_notebook(notebook, {"count": 11}, save=tmp_path / "done.ipynb")
    assert str(failed.value) == (
        'small.py: cell 4 failed (assert count < 10, f"{count} is too many\\nand more"): AssertionError: 11 is too many'
    )
    assert "tinychat 22" in (tmp_path / "done.ipynb").read_text()


def test_what_the_notebook_asks_for(notebook: Path) -> None:
    assert notebook_parameters(notebook) == {"model": '"tinychat"', "count": "2"}
    with pytest.raises(InputError, match=r"small.py has no parameter 'modle' \(nearest: model\)"):
        run_notebook(notebook, {"modle": "x"})


def test_what_is_no_notebook(tmp_path: Path) -> None:
    (tmp_path / "broken.ipynb").write_text("{}")
    (tmp_path / "list.ipynb").write_text("[1]")
    (tmp_path / "text.txt").write_text("hello")
    for name in ("broken.ipynb", "list.ipynb", "text.txt", "none.ipynb"):
        with pytest.raises(InputError, match=name):
            run_notebook(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "model"], "parameter is 'model', expected NAME=VALUE"),
        (["-p", "other=1"], "has no parameter 'other'"),
        (["-o", "x"], "has no parameter 'output'"),
    ],
)
def test_on_the_command_line_bad_input_is_one_line(notebook: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["notebook", "run", str(notebook), *arguments])
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1
