"""The script of an engine: running it gives the same engine, and nothing that a manifest holds becomes code."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Store

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.evaluate.layers.model import EngineLayers
from llmlab.provenance import Step, described, step
from llmlab.runtime.manifest import MANIFEST, digest
from llmlab.script import script
from llmlab.widgets.engine_view.draw import head
from llmlab.widgets.engine_view.state import EngineViewState


def run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the script ended with, and how."""
    path = folder / "rebuild.py"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["rebuild.py", str(folder / "again")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path))
    return ended.value.code


@pytest.fixture(scope="module")
def built(store: Store, tmp_path_factory: pytest.TempPathFactory) -> ll.Engine:
    folder = tmp_path_factory.mktemp("script")
    graph = ll.optimize(ll.export(store.checkpoint("one layer"), max_seq_len=48, progress=False))
    recipe = {"base": "int4_rtn", "layers": {"*.down_proj": "int8"}, "name": "mine"}
    return ll.build(ll.quantize(graph, recipe), folder / "engine", max_seq_len=32, accuracy_level=1)


def test_it_rebuilds_the_engine_with_the_same_hashes(
    built: ll.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, model = script(built), built.manifest.files["model.onnx"]["sha256"]
    assert text.count(model) == 1
    ended = run(text.replace(model, "0" * 64), tmp_path, monkeypatch)
    again = ll.Engine.load(tmp_path / "again").manifest
    assert again.files == built.manifest.files and again.steps == built.manifest.steps
    assert ended == "not the same as before: model.onnx", "all but the one whose hash this test put in"


def test_the_steps_are_the_calls(built: ll.Engine, store: Store) -> None:
    calls = [Step.from_dict(entry) for entry in built.manifest.steps]
    assert [made.call for made in calls] == ["export", "optimize", "quantize", "build"]
    assert calls[0].arguments == {"source": str(store.checkpoint("one layer")), "max_seq_len": 48}
    assert calls[3].arguments == {"max_seq_len": 32, "accuracy_level": 1}
    assert "ll.optimize(graph)" in script(built.path)


def test_steps_are_kept_by_a_graph_on_disk(store: Store, tmp_path: Path) -> None:
    graph = store.serving("llama").copy()
    graph.steps = (step("export", {"source": "here"}, {}), step("optimize", {}, {}))
    assert ll.Graph.load(graph.save(tmp_path / "graph")).steps == graph.steps
    assert ll.convert(graph, "float16").steps[-1].arguments == {"precision": "float16"}
    saved = json.loads((tmp_path / "graph" / "graph.json").read_text())
    saved["steps"][0]["call"] = "exec"
    (tmp_path / "graph" / "graph.json").write_text(json.dumps(saved))
    with pytest.raises(ll.LlmlabError, match="malformed"):
        ll.Graph.load(tmp_path / "graph")


def test_what_no_text_holds_is_asked_for() -> None:
    texts = ["private", "words"]
    made = step("quantize", {"calibration": texts, "seed": 0, "model": object()}, {"seed": 0})
    assert made.arguments == {"calibration": texts} and made.missing == {"model": "a object"}
    assert described(texts).startswith("a list of 2, sha256 ") and "private" not in described(texts)
    assert described([np.zeros(3)]) == "a list"


def test_calibration_texts_are_named_by_their_hash_alone(store: Store, tmp_path: Path) -> None:
    from llmlab.quant.quantize import _step

    texts = ["some private words"]
    recorded = _step(ll.Recipe.parse("int4_awq"), texts, 3)
    assert recorded.arguments == {"recipe": "int4_awq", "seed": 3}
    assert "private" not in json.dumps(recorded.to_dict()) and "sha256" in recorded.missing["calibration"]
    (tmp_path / "c.jsonl").write_text("{}")
    recorded = _step(ll.Recipe.parse("int4_awq"), tmp_path / "c.jsonl", 0)
    assert recorded.arguments["calibration"] == str(tmp_path / "c.jsonl") and "sha256" in recorded.notes[0]


def altered(engine: ll.Engine, **changes: Any) -> ll.Engine:
    return ll.Engine(engine.path, replace(engine.manifest, **changes))


def used(text: str) -> set[str]:
    """Names that a script uses or imports."""
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return imported | {node.id for node in nodes if isinstance(node, ast.Name)}


HOSTILE = "x\n'''\"\"\"\\\nimport os; os.abort() #"


@pytest.mark.parametrize(
    "entry",
    [
        {"call": "export", "arguments": {"source": HOSTILE}, "missing": {}, "notes": [HOSTILE]},
        {"call": "export", "arguments": {}, "missing": {"source": HOSTILE}, "notes": []},
        {"call": "build", "arguments": {"config": {"precision": HOSTILE, HOSTILE: 1}}, "missing": {}, "notes": []},
        {"call": "quantize", "arguments": {"recipe": {HOSTILE: [HOSTILE, float("nan")]}}, "missing": {}, "notes": []},
    ],
)
def test_nothing_that_a_manifest_holds_becomes_code(built: ll.Engine, entry: dict[str, Any]) -> None:
    assert used(script(altered(built, steps=(entry,)))) <= used(script(built)) | {"source", "float"}
    assert "os" in used("import os"), "it would be found"


def test_arguments_that_no_function_has(built: ll.Engine) -> None:
    entry: dict[str, Any] = {"call": "optimize", "arguments": {"then": 1}, "missing": {}, "notes": []}
    with pytest.raises(InputError, match=r"gives llmlab.optimize an argument 'then'"):
        script(altered(built, steps=(entry,)))
    with pytest.raises(InputError, match=r"gives llmlab.export no source"):
        script(altered(built, steps=({**entry, "call": "export", "arguments": {}},)))


def test_an_engine_without_steps(built: ll.Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no steps"):
        script(altered(built, steps=()))
    with pytest.raises(EngineError, match=MANIFEST):
        script(tmp_path)


def test_malformed_steps_are_refused(built: ll.Engine, tmp_path: Path) -> None:
    body = json.loads((built.path / MANIFEST).read_text())
    for steps in ([{"call": "exec"}], [{"call": "export", "arguments": {"a b": 1}, "missing": {}, "notes": []}], 3):
        changed = body | {"steps": steps}
        (tmp_path / MANIFEST).write_text(json.dumps(changed | {"sha256": digest(changed)}))
        with pytest.raises(EngineError, match="malformed"):
            ll.Engine.load(tmp_path)


def test_a_button_of_the_engine_view_copies_it(built: ll.Engine) -> None:
    layers = EngineLayers("engine", "onnxruntime", (), (), {}, {}, {}, ())
    shown = unescape(head(EngineViewState([built, altered(built, steps=())], [layers, layers])))
    assert shown.count("data-copy=") == 1 and f'data-copy="{script(built)}"' in shown
