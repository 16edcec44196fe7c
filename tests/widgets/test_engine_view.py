"""The engine view: rows, bars, sorting, searching, two engines, a page without times, measuring again in a thread."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from llmlab.errors import EngineError, InputError
from llmlab.evaluate.layers.model import CompiledLayer, EngineLayers
from llmlab.widgets.engine_view import panel
from llmlab.widgets.engine_view.panel import EngineView, view_engines


def engine(name: str, scale: float = 1.0, dtype: str = "float32", layers: int = 3, timed: bool = True) -> EngineLayers:
    made = []
    for i in range(layers):
        for what, kind, op, seconds in (("mlp", "product", "MatMul", 3e-4), ("norm", "norm", "RMSNormalization", 1e-5)):
            times = (
                {p: seconds * scale * (1 + i / 10) * f for p, f in (("decode", 1), ("prefill", 20))} if timed else {}
            )
            place = f"model.layers.{i}.{what}"
            made.append(
                CompiledLayer(place, kind, (f"{place}/{op}",), (op,), dtype, times, 4096, dict.fromkeys(times, 5000))
            )
    made.append(CompiledLayer("<b>", "rest", (), ("Copy",), "", {"decode": 1e-6, "prefill": 1e-6} if timed else {}))
    step = {"decode": 1e-3, "prefill": 2e-2} if timed else {}
    settings = {"context": 10, "prompt": 20, "batch": 1, "repeat": 3, "threads": 2} if timed else {}
    notes = () if timed else ("times are not measured: no GPU here",)
    return EngineLayers(name, "onnxruntime", tuple(made), ("model.weight/Cast",), step, {}, settings, notes)


def test_layers_that_are_alike_are_one_row_with_a_bar_and_text() -> None:
    view = view_engines(engine("one"))
    assert [row.name for row in view.rows()] == ["model.layers.0–2.mlp (3×)", "model.layers.0–2.norm (3×)", "<b>"]
    html = view.html()
    assert html.count("ev-bar") == 3 and "300 µs–360 µs each" in html and "&lt;b&gt;" in html and "<b>" not in html
    assert "model.layers.0.mlp/MatMul" in html and "the compiler added it" in html and "model.weight/Cast" in html
    assert "by precision" in html and "1 token after 10" in html
    json.dumps(view.to_dict())
    assert "model.layers.0–2.mlp" in str(view)


def test_sort_search_and_layer() -> None:
    view = view_engines(engine("one"))
    assert set(view.act("sort", value="name")) == {"rows"}
    assert view.rows()[0].name == "<b>"
    view.act("sort", value="nonsense")
    assert view.sort == "name"
    assert "norm" in view.act("search", value="RMSNORM")["rows"] and len(view.rows()) == 1
    assert "nothing is called that" in view.act("search", value="zzz")["rows"]
    view.act("search", value="")
    view.act("block", value="model.layers.1")
    assert [row.name for row in view.rows()] == ["model.layers.1.mlp", "model.layers.1.norm"]
    drawn = view.act("phase", value="prefill")
    assert set(drawn) == {"head", "totals", "rows"} and "a prompt of 20 tokens" in drawn["head"]


def test_two_engines_are_mirrored_and_the_winner_is_said_in_words() -> None:
    view = view_engines(engine("one"), engine("two", 0.5, "int4 × int8"))
    html = view.html()
    assert "won 495 µs (2.0×)" in html and "ev-left" in html and "int4 × int8" in html
    assert "left: one, right: two" in html
    view.act("sort", value="difference")
    assert view.rows()[0].kind == "product"
    assert view.title() == "What runs in one (onnxruntime) against two (onnxruntime)"
    json.dumps(view.to_dict())


def test_without_times_it_says_so_and_draws_no_bar() -> None:
    html = view_engines(engine("one", timed=False)).html()
    assert "no GPU here" in html and "ev-bar" not in html and "3 layers" in html
    both = view_engines(engine("one", timed=False), engine("two", timed=False)).html()
    assert "ev-bar" not in both and "won" not in both.replace("won and lost", "")


def test_a_large_engine_stays_a_small_page() -> None:
    big = view_engines(engine("big", layers=400))
    assert len(big.html()) < 60_000
    many = [CompiledLayer(f"m{i}", "rest", (), ("K",), "", {}) for i in range(2000)]
    html = view_engines(EngineLayers("odd", "tensorrt", tuple(many), ())).html()
    assert "1700 more rows" in html and html.count("<details") <= 301


def test_measuring_again_runs_beside_and_can_be_stopped(monkeypatch) -> None:
    began = threading.Event()

    def slow(what: object, *, stop: threading.Event, **options: object) -> EngineLayers:
        began.set()
        if options.get("fail"):
            raise EngineError("it broke")
        if options.get("wait"):
            assert stop.wait(20)
            raise KeyboardInterrupt
        return engine("again", 2.0)

    monkeypatch.setattr(panel, "layers", slow)
    for options, said in (({"wait": 1}, "stopped"), ({"fail": 1}, "it broke"), ({}, "")):
        view = EngineView([object()], [engine("one")], options)  # type: ignore[list-item]
        drawn: list[dict[str, str]] = []
        view.listen(drawn.append)
        assert "Stop" in view.act("measure")["head"]
        assert began.wait(20)
        if "wait" in options:
            view.close()
        view._worker.join(20)
        assert said in view.status and (view.measured[0].engine == "again") == (not said)
        assert set(drawn[-1]) == {"head", "totals", "rows"}


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one, or two"):
        view_engines()
    with pytest.raises(EngineError):
        view_engines(tmp_path / "none")


def test_a_page_of_its_own(tmp_path: Path) -> None:
    page = view_engines(engine("one"), engine("two")).save(tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page
