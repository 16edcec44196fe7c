"""The notebooks that have instruments, opened and run from top to bottom in JupyterLab."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import RUN_IN_A_BROWSER

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PANELS = {
    "01_checkpoint_to_engine": ("inspector", "stepper"),
    "05_in_flight_batching": ("monitor",),
    "08_chat_with_and_compare_engines": ("chat",),
}


if os.environ.get("LLMLAB_BROWSER") != "required":  # where it is, they run here instead of in nbmake
    pytestmark = pytest.mark.slow


def test_all_that_nbmake_leaves_out_are_run_here() -> None:
    assert set(PANELS) == set(RUN_IN_A_BROWSER)


@pytest.mark.parametrize("name", PANELS)
def test_its_panels_are_live_and_answer(lab, server, name: str) -> None:
    shutil.copy(NOTEBOOKS / f"{name}.ipynb", server.folder)
    lab.page.set_default_timeout(300_000)
    lab.open(f"{name}.ipynb")
    lab.run_all()
    for panel in PANELS[name]:
        view = lab.panel(panel)
        assert view.nameless() == []
        if panel == "stepper":
            view.press("one that did something ▸▸")
        if panel == "monitor":
            view.press("Again from the start")
            view.press("Step", exact=True)
        view.pictures(f"{name[:2]}-{panel}")
    lab.python("get_ipython().kernel.do_shutdown(False)")
