"""`ll.compare` and `llmlab compare`: rows, marks, failures, and how it all looks."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from altered import noisy
from conftest import Store
from rich.console import Console
from typer.testing import CliRunner

import llmlab as ll
from llmlab import cli
from llmlab.errors import EngineError, InputError
from llmlab.evaluate import compare as compare_module
from llmlab.evaluate.accuracy import Accuracy, Evaluation
from llmlab.evaluate.comparison import Comparison, Row, names
from llmlab.evaluate.costs import Cost
from llmlab.evaluate.metrics import Estimate
from llmlab.speed import BenchRow

IDS = [np.random.default_rng(n).integers(3, 96, 20).tolist() for n in range(4)]


@pytest.fixture(scope="module")
def engines(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compared")
    noise = ll.build(noisy(store.serving("llama"), 0.1), folder / "noise", max_tokens_per_step=32).path
    return {"wide": store.engine("llama"), "noise": noise}


def cost(speed: float, size: int, unfit: str = "") -> Cost:
    row = BenchRow(1, 64, 32, 10 * speed, speed, speed / 2, 12.0, 1.0, 0.1)
    rows = (row, replace(row, batch=8, decode_tokens_per_s=5 * speed))
    return Cost(size, 0.1, 200_000_000, 100_000_000, rows, unfit=unfit)


def evaluation(name: str, kl: float, found: Cost | None) -> Evaluation:
    near = Estimate(0.987654, 0.95, 1.0, 62)
    accuracy = Accuracy(
        62,
        841,
        Estimate(kl, kl * 0.7, kl * 1.4, 62),
        near,
        Estimate(1.234e-3, 1e-3, 2e-3, 62),
        {"all": near},
        near,
        near,
    )
    return Evaluation(name, "onnxruntime", "float32", accuracy, found)


COMPARISON = Comparison(
    "float32",
    (
        Row("float32", evaluation("float32", 0.0, cost(60, 34_500_000))),
        Row("int8_smoothquant", evaluation("int8_smoothquant", 1.234e-4, cost(110.5, 9_000_000))),
        Row("int8", evaluation("int8", 2.3e-4, cost(101, 9_000_000))),
        Row("fp8", evaluation("fp8", 3e-5, cost(5, 8_000_000, "this CPU computes fp8 in float32"))),
        Row("broken", None, "weights.bin: missing"),
    ),
)


def test_engines_against_the_first(engines: dict[str, Path]) -> None:
    found = ll.compare(engines, IDS, threads=1, costs=False)
    assert found.reference == "wide" and [row.name for row in found.rows] == ["wide", "noise"]
    first, second = found["wide"].accuracy, found["noise"].accuracy
    assert first.kl is not None and second.kl is not None and first.kl.value == 0 < second.kl.value
    alone = ll.evaluate(engines["noise"], IDS, reference=engines["wide"], threads=1, costs=False)
    assert alone.accuracy == second
    turned = ll.compare(list(engines.values()), IDS, reference=engines["noise"], threads=1, costs=False)
    assert turned.reference == "noise"
    kl = turned["noise"].accuracy.kl
    assert kl is not None and kl.value == 0 and turned.beaten == {}


def test_costs_are_measured_in_turn_and_the_best_counts(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(engine: ll.Engine, **options: object) -> Cost:
        asked.append(engine.path.name)
        if asked.count(engine.path.name) == 2 and engine.path.name == "noise":
            raise EngineError("killed")
        return cost(10 * len(asked), engine.size)

    monkeypatch.setattr(compare_module, "measure_costs", measured)
    found = ll.compare(engines, IDS, threads=1, rounds=2)
    assert asked == ["llama.engine", "noise", "noise", "llama.engine"]
    first = found["wide"].cost
    assert first is not None and first.decode == 40
    assert found.rows[1].problem == "killed"


def test_an_engine_that_fails_takes_only_its_own_row(engines: dict[str, Path], tmp_path: Path, store: Store) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(engines["noise"], damaged)
    opened = ll.Engine.load(damaged)
    (damaged / "model.onnx").write_bytes(b"nothing")
    found = ll.compare({"wide": engines["wide"], "damaged": opened}, IDS, threads=1, costs=False)
    assert found.rows[0].found is not None and found.rows[1].found is None
    assert "ONNX Runtime" in found.rows[1].problem and "damaged: " in str(found)


def test_recipes_beside_the_graph_as_it_is(store: Store, tmp_path: Path, engines: dict[str, Path]) -> None:
    graph = store.serving("llama")
    wide = {"small head": {"base": "int8", "layers": {"head": "int8"}}, "int8": "int8", "fp16": "fp16"}
    found = ll.compare(wide, IDS, graph=graph, folder=tmp_path, threads=1, costs=False, progress=False)
    assert [row.name for row in found.rows] == [
        "float32",
        "small head",
        "int8",
        "fp16",
    ] and found.reference == "float32"
    kls = [found[name].accuracy.kl for name in ("float32", "int8", "small head")]
    assert kls[0] is not None and kls[1] is not None and kls[2] is not None
    assert 0 == kls[0].value < kls[1].value < kls[2].value
    assert "float32 rounded to float16" in found["fp16"].precision and found["fp16"].accuracy.kl is not None
    assert 0 < found["fp16"].accuracy.kl.value < kls[1].value
    assert found["int8"].precision.startswith("float32, int8: int8 per channel")
    again = ll.compare([tmp_path / "as it is", tmp_path / "int8"], IDS, threads=1, costs=False)
    assert again["int8"].accuracy == found["int8"].accuracy
    with pytest.raises(InputError, match="no recipe is named 'int9'"):
        ll.compare(["int8", "int9"], IDS, graph=graph)


def test_marks_data_and_notes() -> None:
    assert COMPARISON.beaten == {"int8": "int8_smoothquant"}, (
        "fp8 is neither beaten nor does it beat: its speed doesn't count"
    )
    data = json.loads(json.dumps(COMPARISON.to_dict()))
    assert [row["beaten_by"] for row in data["rows"]] == [None, None, "int8_smoothquant", None, None]
    assert data["rows"][3]["cost"]["speed_counts"] is False and data["rows"][4]["problem"] == "weights.bin: missing"
    with pytest.raises(KeyError):
        COMPARISON["broken"]


def test_it_fits_in_80_columns_with_nothing_cut() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(COMPARISON)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    for text in ("0.00012", "8.6e-05–0.00017", "95.0–100.0", "× int8", "5*", "its speed doesn't count", "broken: "):
        assert text in shown, text
    assert "float32" in str(COMPARISON)


def test_html_is_a_table_and_a_picture_without_scripts() -> None:
    html = COMPARISON._repr_mimebundle_()["text/html"]
    assert html.count("<table") == 2 and "<svg" in html and "<script" not in html and "same greedy answer" in html
    hostile = Comparison("<b>", (Row("<script>", evaluation("x", 0.1, None)), Row("y", None, "<script>")))
    assert "<script>" not in hostile._repr_mimebundle_()["text/html"]


def test_names_are_unique() -> None:
    assert names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_what_cannot_be_compared(engines: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="expected a list of engines"):
        ll.compare([])
    with pytest.raises(InputError, match="expected a list of engines"):
        ll.compare("engine")
    with pytest.raises(InputError, match="rounds is 0"):
        ll.compare(engines, IDS, rounds=0)
    with pytest.raises(EngineError, match="no such folder"):
        ll.compare(["nowhere"])


def test_the_verb(engines: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, IDS)))
    command = [
        "compare",
        *map(str, engines.values()),
        "--data",
        str(tmp_path / "ids.jsonl"),
        "--no-costs",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(cli.app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["kind"] == "comparison" and data["rows"][1]["accuracy"]["kl"]["value"] > 0
    shown = CliRunner().invoke(cli.app, command)
    assert shown.exit_code == 0 and "noise" in shown.output and "top-1" in shown.output
    for refused in (
        ["nowhere"],
        ["a", "b", "--recipes", "int8"],
        ["a", "-o", "b"],
        ["nowhere", "--recipes", "int9"],
    ):
        assert CliRunner().invoke(cli.app, ["compare", *refused]).exit_code == 2


def test_the_verb_with_recipes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, IDS)))
    store.serving("llama").save(tmp_path / "graph")
    command = ["compare", str(tmp_path / "graph"), "--recipes", "int8", "--data", str(tmp_path / "ids.jsonl"), "--json"]
    done = CliRunner().invoke(cli.app, [*command, "--no-costs", "--threads", "1", "-o", str(tmp_path / "kept")])
    assert done.exit_code == 0, done.output
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["float32", "int8"]
    assert ll.Engine.load(tmp_path / "kept" / "int8").manifest.recipe


def test_text_has_no_escapes_where_rich_would_like_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(COMPARISON)
