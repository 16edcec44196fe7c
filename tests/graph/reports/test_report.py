"""Reports of passes: what is in them, how they fold, and that they come back from a file as they were."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from small_graphs import apply, attention_graph, small_graph

from llmlab.graph.graph import Graph
from llmlab.graph.optimize import optimize
from llmlab.graph.passes.simplify import RemoveNoOps
from llmlab.graph.reports.diff import Change, GraphDiff
from llmlab.graph.reports.fold import block_of, fold, layer_of, natural
from llmlab.graph.reports.report import History, NearMiss, PassReport, Rewrite
from llmlab.graph.reports.sketch import Sketch, SketchNode
from llmlab.graph.rewrite import Match, Pass


def terminal(shown: Any, width: int = 60) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


# What a run of a pass leaves


def test_a_report_says_where_and_what_went() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        a = Identity(x)
        b = Relu(a)
        c = Dropout(b)
        d = Identity(c)
        y = Neg(d)
    }"""
    graph = small_graph(text)
    _, report = apply(RemoveNoOps, graph)
    assert report.places == (
        Rewrite("m.a/Identity", (), ("m.a/Identity",)),
        Rewrite("m.c/Dropout", (), ("m.c/Dropout",)),
        Rewrite("m.d/Identity", (), ("m.d/Identity",)),
    )
    assert (report.nodes_before, report.nodes_after, report.matches, report.rewrites) == (5, 2, 3, 3)
    assert report.source == f"llmlab/graph/passes/simplify.py:{line_of('class RemoveNoOps')}"
    assert report.diff.removed == {"m.a/Identity": "Identity", "m.c/Dropout": "Dropout", "m.d/Identity": "Identity"}
    assert report.diff.changed["m.y/Neg"] == (Change("input 0", "m.d/Identity", "m.b/Relu"),)


def line_of(start: str) -> int:
    path = Path(__file__).parents[3] / "llmlab/graph/passes/simplify.py"
    return next(i for i, line in enumerate(path.read_text().splitlines(), start=1) if line.startswith(start))


class DoubleNegation(Pass):
    """-(-x) → |x|, which is wrong, but easily seen."""

    name = "double_negation"

    def pattern(self, node: gs.Node) -> Match | None:
        inner = node.inputs[0].inputs[0] if node.op == "Neg" and node.inputs[0].inputs else None
        return Match(node=node, x=inner.inputs[0]) if inner is not None and inner.op == "Neg" else None

    def rewrite(self, edit: Any, match: Match) -> None:
        old = match.node.outputs[0]
        edit.replace(old, edit.add("Abs", "m", [match.x], dtype=old.dtype, shape=old.shape))


def test_each_rewrite_has_the_nodes_nearest_to_it() -> None:
    text = """m (float[N] x, float[N] y) => (float[N] z) {
        a = Neg(x)
        b = Neg(a)
        c = Neg(y)
        d = Neg(c)
        z = Add(b, d)
    }"""
    _, report = apply(DoubleNegation, small_graph(text))
    assert [(p.node, p.added, set(p.removed)) for p in report.places] == [
        ("m.b/Neg", ("m/Abs",), {"m.a/Neg", "m.b/Neg"}),
        ("m.d/Neg", ("m/Abs_1",), {"m.c/Neg", "m.d/Neg"}),
    ]


def test_runs_of_one_pass_are_told_apart_and_weights_are_counted(store: Store) -> None:
    history = store.serving("llama").history
    runs = [r for r in history if r.name == "remove_no_ops"]
    assert [r.run for r in runs] == list(range(1, len(runs) + 1)) and len(runs) > 1
    assert runs[0].title == "remove_no_ops" and runs[1].title == "remove_no_ops #2"
    assert len({r.title for r in history}) == len(history)
    for before, after in pairwise(history):
        assert (before.nodes_after, before.weight_bytes_after) == (after.nodes_before, after.weight_bytes_before)
    assert history[-1].weight_bytes_after == store.serving("llama").weight_bytes
    assert any(r.weight_bytes_before < r.weight_bytes_after for r in history), "RoPE's tables are weights"


def test_what_all_rewrites_removed_is_what_the_diff_says(store: Store) -> None:
    for report in store.serving("llama").history:
        removed = [name for place in report.places for name in place.removed]
        assert len(removed) == len(set(removed)) and set(removed) <= set(report.diff.removed)
        assert not report.rewrites or set(removed) == set(report.diff.removed), report.title
        assert len(report.places) == report.rewrites == report.matches - len(report.near_misses)


def test_no_report_names_a_folder_of_this_machine(store: Store) -> None:
    text = json.dumps([r.to_dict() for r in store.serving("llama").history])
    assert str(Path(__file__).parents[3]) not in text
    assert all(r.source.startswith("llmlab/graph/passes/") for r in store.serving("llama").history)


def test_a_pass_without_a_file_has_no_source() -> None:
    space: dict[str, Any] = {"Pass": Pass, "__name__": "nowhere"}
    exec("class Odd(Pass):\n    name = 'odd'\n    def pattern(self, node): return None", space)
    assert optimize(attention_graph(), passes=[space["Odd"]]).history[-1].source == ""


# Folding


def test_layers_and_blocks() -> None:
    names = [
        "model.layers.3.mlp.up_proj/MatMul_1",
        "model.layers.3/Add",
        "lm_head/MatMul",
        "a.b",
        "transformer.h.0.attn/x",
    ]
    assert [layer_of(n) for n in names] == ["model.layers.3", "model.layers.3", "lm_head", "a.b", "transformer.h.0"]
    assert [block_of(n) for n in names] == [
        "model.layers.3.mlp",
        "model.layers.3",
        "lm_head",
        "a.b",
        "transformer.h.0.attn",
    ]
    assert layer_of("model.layers.0.mlp.experts.7.up/MatMul") == "model.layers.0"
    assert sorted(["l.10", "l.2", "a"], key=natural) == ["a", "l.2", "l.10"]
    assert sorted(["l.0²", "l.0¹", "l.٣"], key=natural) == ["l.0²", "l.0¹", "l.٣"], (
        "digits of other scripts are letters"
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([f"m.layers.{i}.attn/A" for i in range(30)], [("m.layers.0–29.attn/A", 30)]),
        (["m.layers.1/A", "m.layers.1/B"], [("m.layers.1/A", 1), ("m.layers.1/B", 1)]),
        ([f"m.layers.{i}/A" for i in (0, 1, 2, 7)], [("m.layers.0–2, 7/A", 4)]),
        ([f"m.layers.{i}/A" for i in range(0, 30, 2)], [("m.layers.0, 2, 4, …, 28/A", 15)]),
        (["m.layers.3/A", "m.layers.3/A"], [("m.layers.3/A", 2)]),
        (["lm_head/A", "lm_head/A", "x"], [("lm_head/A", 2), ("x", 1)]),
        (["m.layers.0.experts.1/A", "m.layers.1.experts.1/A"], [("m.layers.0–1.experts.1/A", 2)]),
        (
            ["m.layers.0.experts.1/A", "m.layers.0.experts.2/A"],
            [("m.layers.0.experts.1/A", 1), ("m.layers.0.experts.2/A", 1)],
        ),
        ([f"m.layers.{'9' * 5000}/A"], [(f"m.layers.{'9' * 5000}/A", 1)]),
    ],
)
def test_rows_that_differ_in_their_layer_are_one(rows: list[str], expected: list[tuple[str, int]]) -> None:
    assert [(f.texts[0], f.count) for f in fold((row,) for row in rows)] == expected


def test_other_layers_in_a_row_are_told_from_its_own() -> None:
    rows = [(f"m.layers.{i}/A", f"it reads m.layers.{i - 1}/B and axis 1.5") for i in range(1, 9)]
    (folded,) = fold(rows)
    assert folded.texts == ("m.layers.1–8/A", "it reads m.layers.0–7/B and axis 1.5") and folded.times == " (8×)"
    assert len(fold([*rows, ("m.layers.9/A", "it reads m.layers.3/B and axis 1.5")])) == 2, (
        "another distance is another row"
    )


def test_thirty_near_misses_are_one_line() -> None:
    misses = tuple(NearMiss(f"model.layers.{i}.self_attn/Attention", "no RoPE here") for i in range(30))
    report = PassReport("fuse", "Fuses.", 30, 0, misses)
    for shown in (str(report), report._repr_mimebundle_()["text/html"], terminal(report, 120)):
        assert "model.layers.0–29.self_attn/Attention: no RoPE here (30×)" in shown and shown.count("no RoPE") == 1


# What is saved comes back


texts = st.text(max_size=12)
paths = st.builds("model.layers.{}.{}/{}".format, st.integers(0, 99), texts, texts)
pairs = st.dictionaries(texts, st.tuples(texts, texts), max_size=3)
diffs = st.builds(
    GraphDiff,
    st.dictionaries(paths, texts, max_size=3),
    st.dictionaries(paths, texts, max_size=3),
    st.dictionaries(paths, st.lists(st.builds(Change, texts, texts, texts), max_size=3).map(tuple), max_size=3),
    st.dictionaries(texts, st.integers(), max_size=3),
    pairs,
    pairs,
)
names = st.lists(paths, max_size=3).map(tuple)
drawn = st.lists(st.builds(SketchNode, paths, texts, names, names), max_size=2).map(tuple)
reports = st.builds(
    PassReport,
    texts,
    texts,
    st.integers(0, 99),
    st.integers(0, 99),
    st.lists(st.builds(NearMiss, paths, texts), max_size=4).map(tuple),
    st.integers(0, 9999),
    st.integers(0, 9999),
    st.floats(0, 1e6),
    diffs,
    st.lists(st.builds(Rewrite, paths, names, names), max_size=4).map(tuple),
    st.integers(1, 9),
    texts,
    st.integers(0, 1 << 60),
    st.integers(0, 1 << 60),
    st.lists(st.builds(Sketch, paths, drawn, drawn, st.integers(0, 9)), max_size=2).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(report=reports)
def test_any_report_comes_back_and_can_be_shown(report: PassReport) -> None:
    assert PassReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    for shown in (report, report.diff):
        assert shown._repr_mimebundle_().keys() == {"text/plain", "text/html"} and str(shown) and terminal(shown)


def test_history_survives_save_and_load(store: Store, tmp_path: Path) -> None:
    graph = store.plain("qwen2")
    made = optimize(graph)
    again = Graph.load(made.save(tmp_path / "graph"))
    assert again.history == made.history and isinstance(again.history, History)
    assert again.history[3] != made.history[4], "reports can differ"


def old(data: dict[str, Any]) -> dict[str, Any]:
    """A report as llmlab 0.1 wrote it."""
    new = ("places", "sketches", "run", "source", "weight_bytes_before", "weight_bytes_after")
    diff = {what: list(data["diff"][what]) for what in ("added", "removed", "changed")} | {"ops": data["diff"]["ops"]}
    return {key: value for key, value in data.items() if key not in new} | {"diff": diff}


def test_reports_of_the_last_version_are_read(store: Store) -> None:
    report = store.serving("llama").history[0]
    found = PassReport.from_dict(old(report.to_dict()))
    assert (found.name, found.near_misses, found.nodes_after) == (report.name, report.near_misses, report.nodes_after)
    assert list(found.diff.removed) == list(report.diff.removed) and found.diff.by_layer() == report.diff.by_layer()
    assert found.places == () and found.run == 1 and found._repr_mimebundle_()["text/html"] and terminal(found.diff)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"summary": None},
        {"matches": "2"},
        {"rewrites": True},
        {"seconds": "fast"},
        {"near_misses": [{"node": "a"}]},
        {"near_misses": [{"node": 1, "reason": "b"}]},
        {"places": [{"node": "a", "added": [1], "removed": []}]},
        {"places": [3]},
        {"diff": None},
        {"diff": {"added": {"a": 1}, "removed": {}, "changed": {}, "ops": {}}},
        {"diff": {"added": {}, "removed": {}, "changed": {"a": [["x", "y"]]}, "ops": {}}},
        {"diff": {"added": {}, "removed": {}, "changed": {}, "ops": {"Add": "1"}}},
        {"diff": {"added": {}, "removed": {}, "changed": {}, "ops": {}, "weights": {"w": ["a"]}}},
        {"source": 3},
        {"sketches": [{"node": "a", "before": [["a", "Add", [1], []]], "after": [], "left_out": 0}]},
        {"sketches": [{"node": "a", "before": [], "after": []}]},
        {"run": None},
    ],
)
def test_malformed_reports_are_refused(change: dict[str, Any]) -> None:
    good = PassReport("p", "", 1, 1).to_dict()
    assert PassReport.from_dict(good)
    with pytest.raises((TypeError, KeyError, ValueError, AttributeError)):  # what Graph.load makes one line of
        PassReport.from_dict(good | change)


# How it looks


EVIL = "m.<script>alert(1)</script>/Add"


def test_names_are_escaped_and_steer_no_terminal() -> None:
    diff = GraphDiff(
        {EVIL: EVIL}, {}, {EVIL + "_1": (Change("input 0", EVIL, "\x1b[2Jb"),)}, {EVIL: 1}, {EVIL: (EVIL, "–")}
    )
    report = PassReport(
        EVIL, EVIL, 1, 1, (NearMiss(EVIL, EVIL),), diff=diff, places=(Rewrite(EVIL, (EVIL,), (EVIL,)),), source=EVIL
    )
    for shown in (report, diff):
        html = shown._repr_mimebundle_()["text/html"]
        assert "<script" not in html and html.count("&lt;script&gt;") > 2
        assert "\x1b[2J" not in terminal(shown)
    assert "[bold]" in terminal(PassReport("[bold]x[/bold]", "", 1, 1)), "no markup in names counts"


@pytest.mark.parametrize("width", [60, 160])
def test_history_fits_a_narrow_terminal(store: Store, width: int) -> None:
    history = store.serving("llama").history
    shown = terminal(history, width)
    assert max(map(len, shown.splitlines())) <= width
    for report in history:
        assert report.title in shown and f"{report.nodes_before} → {report.nodes_after}" in shown
    assert terminal(History()) == "no pass has run\n"


def test_html_says_in_words_what_the_colors_say(store: Store) -> None:
    html = store.serving("llama").history._repr_mimebundle_()["text/html"]
    assert "<details>" in html and ">removed</span>" in html and ">added</span>" in html
    assert "llmlab/graph/passes/page_attention.py:" in html
