"""`llmlab.inspect` of engines, and the command line's page and table of their layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmlab
from llmlab.errors import InputError
from llmlab.widgets.engine_view.panel import EngineView

OPTIONS = {"context": 4, "prompt": 5, "repeat": 3, "threads": 1}


def test_engines_are_inspected_opened_or_measured(store) -> None:
    engine = llmlab.Engine.load(store.engine("llama"))
    one = llmlab.inspect(engine, **OPTIONS)
    assert isinstance(one, EngineView) and one.measured[0].settings["prompt"] == 5
    both = llmlab.inspect(engine, one.measured[0], **OPTIONS)
    assert isinstance(both, EngineView) and len(both.measured) == 2 and both.alignment is not None
    assert all(row.verdict("decode")[0] for row in both.rows())


def test_bad_input(store) -> None:
    engine = llmlab.Engine.load(store.engine("llama"))
    with pytest.raises(InputError, match="expected a Graph or an Engine"):
        llmlab.inspect(3)
    with pytest.raises(InputError, match="is a Graph, expected an engine"):
        llmlab.inspect(engine, store.serving("llama"))
    with pytest.raises(InputError, match="for graphs"):
        llmlab.inspect(engine, times={})
    with pytest.raises(InputError, match="for engines"):
        llmlab.inspect(store.serving("llama"), engine)


def test_the_command_line_prints_layers_and_writes_a_page(store, tmp_path: Path) -> None:
    from llmlab import cli

    path, page = str(store.engine("llama")), tmp_path / "page.html"
    shown = CliRunner().invoke(cli.app, ["inspect", path, "--layers", "--html", str(page), "--threads", "1"])
    assert shown.exit_code == 0 and "self_attn" in shown.stdout and "ev-row" in page.read_text()
    data = CliRunner().invoke(cli.app, ["inspect", path, "--layers", "--json", "--threads", "1"])
    assert json.loads(data.stdout)["layers"]
    assert CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--layers"]).exit_code != 0
