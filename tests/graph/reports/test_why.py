"""`graph.why(place)`: what fired there, what held back and why, and what was not found there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from small_graphs import attention_graph
from test_report import EVIL, terminal

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.reports.report import NearMiss, PassReport, Rewrite
from llmlab.graph.reports.why import why


class Reluctant(ll.Pass):
    """Finds products and leaves those of layer 1 alone."""

    name = "reluctant"

    def pattern(self, node: gs.Node) -> ll.Match | None:
        return ll.Match(node=node) if node.op == "MatMul" and ".mlp" in node.name else None

    def check(self, edit: ll.Editor, match: ll.Match) -> str | None:
        return "layer 1 is not to be touched" if ".1." in match.node.name else None

    def rewrite(self, edit: ll.Editor, match: ll.Match) -> None:
        old = match.node.outputs[0]
        edit.replace(old, edit.add("MatMul", "mine", list(match.node.inputs), dtype=old.dtype, shape=old.shape))


@pytest.fixture(scope="module")
def graph(store: Store) -> Graph:
    with ll.registered_pass(Reluctant, before="fuse_rope"):
        return ll.optimize(store.plain("llama"))


def test_what_fired_and_what_it_did_there(graph: Graph) -> None:
    found = graph.why("layers.0.self_attn")
    by_name = {here.report.title: here for here in found.passes}
    assert list(by_name) == [r.title for r in graph.history]
    paged = by_name["page_attention"]
    assert paged.status == "fired" and [r.node for r in paged.rewrites] == ["model.layers.0.self_attn/Attention"]
    assert "model.layers.0.self_attn/PagedAttention" in paged.diff.added
    assert "model.layers.0.self_attn/Attention" in paged.diff.removed
    assert all(".layers.0.self_attn" in n for here in found.passes for n in (*here.diff.added, *here.diff.removed))
    assert by_name["fold_constants"].status == "changed", "one rewrite, anchored elsewhere"
    assert by_name["gather_logits"].status == "not found" and "gather_logits" in found.not_found
    assert "page_attention" not in found.not_found and "remove_no_ops" not in found.not_found


def test_near_misses_with_their_reason(graph: Graph) -> None:
    held = {here.report.name: here for here in graph.why("layers.1.mlp").passes}["reluctant"]
    assert held.status == "near miss" and not held.rewrites
    assert {m.reason for m in held.near_misses} == {"layer 1 is not to be touched"} and len(held.near_misses) == 3
    fired = {here.report.name: here for here in graph.why("layers.0.mlp").passes}["reluctant"]
    assert fired.status == "fired" and len(fired.rewrites) == 3 and not fired.near_misses
    both = {here.report.name: here for here in graph.why("mlp").passes}["reluctant"]
    assert both.status == "fired" and len(both.rewrites) == 3 and len(both.near_misses) == 3
    text = str(graph.why("mlp"))
    assert "not model.layers.1.mlp.up_proj/MatMul: layer 1 is not to be touched" in text


def test_not_found(graph: Graph) -> None:
    found = graph.why("embed_tokens")
    assert {"fuse_rms_norm", "fuse_rope", "page_attention", "merge_products", "reluctant"} <= set(found.not_found)
    assert "pattern not found: " in str(found) and "fuse_rope" in terminal(found)


@pytest.mark.parametrize(
    "place",
    [
        "model.layers.0.self_attn",
        "layers.0.self_attn.q_proj",
        "self_attn/Attention",
        "model.layers.1.self_attn/PagedAttention",
        "lm_head",
        "0.mlp",
        "rotary_emb",
    ],
)
def test_places_that_are_known_also_if_they_are_gone(graph: Graph, place: str) -> None:
    assert graph.why(place).with_status("fired", "changed")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("layers.0.self_atn", "nearest: .*model.layers.0.self_attn"),
        ("layers.7.mlp", "'layers.7.mlp' is no module or node of this graph, now or earlier"),
        ("yers.0", "is no module"),
        ("self_attn/Atention", "nearest: .*self_attn/Attention"),
        ("", "place is '', expected a part of a module's path"),
        (".", "expected a part of a module's path"),
        (3, "place is 3, expected a part of a module's path"),
    ],
)
def test_unknown_places_are_one_line(graph: Graph, place: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        graph.why(place)
    assert "\n" not in str(caught.value)


def test_a_loaded_graph_knows_as_much(graph: Graph, tmp_path: Path) -> None:
    loaded = Graph.load(graph.save(tmp_path / "graph"))
    for place in ("layers.0.self_attn", "mlp"):
        assert loaded.why(place) == graph.why(place)
        assert json.loads(json.dumps(loaded.why(place).to_dict())) == json.loads(json.dumps(graph.why(place).to_dict()))
    assert loaded.why("layers.0.mlp") != loaded.why("layers.1.mlp")


def test_a_graph_that_no_pass_has_seen() -> None:
    found = attention_graph().why("m.a")
    assert found.passes == () and "no pass has run on this graph" in str(found)
    assert "no pass has run" in terminal(found) and "no pass has run" in found._repr_mimebundle_()["text/html"]


def test_how_it_looks(graph: Graph) -> None:
    found = graph.why("layers.0")
    shown = terminal(found)
    assert max(map(len, shown.splitlines())) <= 60
    assert "fired elsewhere, changed this" in shown and "layers.0  … is model.layers.0" in shown
    assert "+ ….self_attn/PagedAttention" in shown and "more lines: --json and notebooks show all" in shown
    html = found._repr_mimebundle_()["text/html"]
    assert "<details>" in html and "<small>added</small>" in html and "<small>removed</small>" in html
    assert found.to_dict()["passes"][0].keys() >= {"pass", "run", "status", "source", "rewrites", "near_misses", "diff"}


def test_a_terminal_is_not_flooded(graph: Graph) -> None:
    """Lines fit and are few; what they leave out is in the HTML. Where a place is several modules, names stay whole."""
    found = graph.why("layers.0.self_attn")
    shown = terminal(found, 80)
    assert "model.layers.0.self_attn/" not in shown
    per_pass = re.split(r"^(?=\w)", shown, flags=re.M)
    assert len(per_pass) > 10 and max(len(part.splitlines()) for part in per_pass) <= 1 + 9 + 4
    page = found._repr_mimebundle_()["text/html"]
    assert page.count("model.layers.0.self_attn/") > shown.count("…/")
    assert "model.layers.1.mlp.up_proj/MatMul" in terminal(graph.why("mlp"), 80)


def test_names_are_escaped() -> None:
    graph = attention_graph()
    graph.history.append(PassReport(EVIL, "", 2, 1, (NearMiss(EVIL, EVIL),), places=(Rewrite(EVIL),), source=EVIL))
    found = why(graph, "m")
    html = found._repr_mimebundle_()["text/html"]
    assert "<script" not in html and html.count("&lt;script&gt;") > 2 and found.passes[0].status == "fired"
