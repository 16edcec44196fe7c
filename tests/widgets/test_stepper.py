"""The pass stepper without a browser: what it shows of a history, also of one that comes from a file of a stranger."""

import re
from pathlib import Path

import pytest

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.optimize import optimize
from llmlab.graph.reports.report import NearMiss, PassReport, Rewrite
from llmlab.graph.reports.sketch import MOST_NODES, MOST_PLACES, Sketch, SketchNode
from llmlab.graph.reports.snapshot import snapshot
from llmlab.widgets.stepper.source import source_lines


@pytest.fixture(scope="module")
def graph(store) -> Graph:
    """Loaded from disk, as everything in the store."""
    return store.serving("llama")


def step_to(panel, title: str):
    panel.act("step", "", 1 + [r.title for r in panel.reports].index(title))
    return panel


def test_sketches_are_the_graphs_before_and_after(store):
    """Each node of a sketch is in the graph before or after the pass, just as it is sketched."""
    plain = store.plain("llama")
    done = optimize(plain)
    seen = snapshot(plain.surgeon), snapshot(done.surgeon)
    first = next(r for r in done.history if r.rewrites)
    assert first.sketches
    for sketch in first.sketches:
        for node in sketch.before:
            facts = seen[0].nodes[node.name]
            assert (node.op, node.inputs, node.outputs) == (facts.op, facts.inputs, facts.outputs)
    last = [r for r in done.history if r.rewrites][-1]
    for sketch in last.sketches:
        for node in sketch.after:
            facts = seen[1].nodes[node.name]
            assert (node.op, node.inputs, node.outputs) == (facts.op, facts.inputs, facts.outputs)


def test_sketches_are_few_and_small_and_hold_what_went_and_came(graph):
    for report in graph.history:
        assert len(report.sketches) <= MOST_PLACES and bool(report.sketches) == bool(report.rewrites)
        anchors = {p.node: p for p in report.places}
        for sketch in report.sketches:
            assert max(len(sketch.before), len(sketch.after)) <= MOST_NODES
            place = anchors[sketch.node]
            before, after = ({n.name for n in side} for side in (sketch.before, sketch.after))
            assert not before & set(report.diff.added) and not after & set(report.diff.removed)
            if not sketch.left_out:
                assert set(place.removed) <= before and set(place.added) & set(report.diff.added) <= after


def test_the_picture_marks_what_came_and_went_in_words(graph):
    panel = step_to(ll.steps(graph), "fuse_rms_norm")
    sides = panel.draw_sides()
    before, after = sides.split("<h4>after</h4>")
    assert "- Pow" in before and "removed" in before and "box removed" in before and "RMSNormalization" not in before
    assert "+ RMSNormalization" in after and "added" in after and "- Pow" not in after
    assert 'class="arrow"' in before and 'class="arrow"' in after
    assert "added" in panel.draw_changes() and "RMSNormalization" in panel.draw_changes()


def test_alike_layers_are_shown_once_and_places_can_be_chosen(graph):
    panel = step_to(ll.steps(graph), "fuse_rms_norm")
    assert len(panel.places) < panel.report.rewrites == sum(place.count for place in panel.places)
    assert f"×{max(place.count for place in panel.places)}" in panel.draw_places()
    first = panel.draw_sides()
    assert set(panel.act("place", "1")) == {"places", "sides", "changes"} and panel.draw_sides() != first
    assert "problem" in panel.act("place", "99") and "problem" in panel.act("place", "x")


def test_the_slider_and_the_buttons_go_through_the_history(graph):
    panel = ll.steps(graph)
    assert panel.report.rewrites and not any(r.rewrites for r in panel.reports[: panel.at])
    panel.act("step", "", 1)
    assert panel.at == 0 and "disabled" in panel.draw_bar()
    panel.act("previous")
    assert panel.at == 0
    panel.act("next")
    assert panel.at == 1
    panel.act("step", "", 10_000)
    assert panel.at == len(graph.history) - 1
    panel.act("jump", "-")
    assert panel.report.rewrites or panel.report.near_misses
    assert "bar" not in panel.act("step", "", 3), "a slider that is being moved isn't replaced"
    for at in range(len(graph.history)):
        panel.act("step", "", at + 1)
        assert panel.report.title in panel.draw_pass() and panel.problem == ""


def test_it_begins_where_it_is_told_to(graph):
    assert ll.steps(graph, "page_attention").report.name == "page_attention"
    assert ll.steps(graph, 2).at == 2
    with pytest.raises(InputError, match="nearest: page_attention"):
        ll.steps(graph, "page_atention")
    for wrong in (-1, True, 10_000):
        with pytest.raises(InputError, match="at is"):
            ll.steps(graph, wrong)
    with pytest.raises(InputError, match="expected a Graph"):
        ll.steps("graph")


def test_what_nearly_matched_is_listed_once_with_the_reason(graph):
    reports = [PassReport("p", "", 4, 0, tuple(NearMiss(f"m.layers.{i}/Add", "too wide") for i in range(4)))]
    panel = ll.steps(Graph(graph.surgeon, graph.config, history=reports))
    drawn = panel.draw_places()
    assert drawn.count("too wide") == 1 and "×4" in drawn and "m.layers.0–3/Add" in drawn
    assert "nothing" in step_to(ll.steps(graph), graph.history[0].title).draw_places()


def test_a_graph_that_was_never_optimized_says_so(store):
    panel = ll.steps(store.plain("llama"))
    assert "no pass has run" in panel.title() and "llmlab.optimize" in panel.html()
    for act in (("next",), ("previous",), ("jump", "+"), ("step", "", 1), ("place", "0")):
        panel.act(*act)
    assert panel.static() and panel.to_dict()["passes"] == []


def test_what_quantizing_did_is_a_step_too(graph):
    made = ll.quantize(graph, {"weights": {"dtype": "int4", "group": 16}})
    panel = ll.steps(made, "quantize")
    assert "DequantizeLinear" in panel.draw_sides() and "each projection" in panel.draw_pass()
    assert "self_attn/MatMul" in panel.draw_places() and "lm_head stays wide" in panel.draw_places()


def test_the_source_is_read_from_the_package_alone(graph, tmp_path):
    for report in graph.history:
        first, lines = source_lines(report.source)
        assert lines[0].startswith("class ") and f'name = "{report.name}"' in "\n".join(lines)
        assert report.source.endswith(f":{first}")
    (tmp_path / "secret.py").write_text("class Secret:\n    pass\n")
    outside = [f"{tmp_path}/secret.py:1", f"llmlab/../{tmp_path}/secret.py:1", "llmlab/../tests/conftest.py:1", "", "x"]
    outside += ["llmlab/graph/passes/../../../pyproject.toml:1", "/etc/passwd:1", "__main__:3", "llmlab/nothing.py:1"]
    outside += ["llmlab/errors.py:1", "llmlab/errors.py:999999", "llmlab/errors.py:0"]
    assert [source_lines(place) for place in outside] == [(0, [])] * len(outside)


def test_what_strangers_wrote_is_text(graph, tmp_path: Path):
    evil = "<script>alert(1)</script>\x1b/'\"Add"
    node = SketchNode(evil, evil, (evil, "", evil + ":1"), (evil,))
    sketch = Sketch(evil, (node,), (node, SketchNode("b", "Add", (evil,), ())), 3)
    report = PassReport(
        evil, evil, 2, 1, (NearMiss(evil, evil),), places=(Rewrite(evil, (evil,), (evil,)),), sketches=(sketch,), source=evil
    )  # fmt: skip
    panel = ll.steps(Graph(graph.surgeon, graph.config, history=[report]))
    page = panel.save(tmp_path / "page.html").read_text() + panel.html()
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page


def test_old_histories_have_no_pictures(graph):
    data = [r.to_dict() for r in graph.history]
    for entry in data:
        del entry["sketches"]
    panel = ll.steps(Graph(graph.surgeon, graph.config, history=map(PassReport.from_dict, data)), "fuse_rms_norm")
    assert "No picture" in panel.draw_sides() and "removed" in panel.draw_changes()


def test_the_static_form_lists_all_passes(graph):
    page = ll.steps(graph, "fuse_rms_norm").static()
    for report in graph.history:
        assert re.search(rf"<summary><b>{re.escape(report.title)}</b></summary>", page)
    assert "<svg" in page and "<script" not in page and "http" not in page


def test_rows_can_be_reached_by_keyboard(graph):
    panel = step_to(ll.steps(graph), "fuse_rms_norm")
    rows = re.findall(r'<div [^>]*role="option"[^>]*>', panel.draw_places())
    assert rows and all('tabindex="0"' in row and "data-act=" in row for row in rows)
    assert 'data-walk="column"' in panel.draw_places() and re.search(r"<label[^>]*>pass <input", panel.draw_bar())
