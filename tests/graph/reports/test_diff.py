"""Differences between two graphs: small edits that are known, none at all, and large graphs in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from conftest import Store
from small_graphs import CONFIG, attention_graph, ops, padded_tokens, same
from test_report import terminal

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.lower.onnxruntime import lower
from llmlab.graph.reports.diff import Change, GraphDiff, diff


def node(graph: Graph, name: str) -> gs.Node:
    return next(n for n in graph.surgeon.nodes if n.name == name)


def edited(change: Callable[[Graph], Any]) -> GraphDiff:
    before = attention_graph()
    after = before.copy()
    change(after)
    found = before.diff(after)
    back = after.diff(before)
    assert dict(found.added) == dict(back.removed) and dict(found.removed) == dict(back.added)
    assert {n: [(w, b, a) for w, a, b in c] for n, c in back.changed.items()} == {
        n: list(c) for n, c in found.changed.items()
    }
    return found


def test_a_graph_does_not_differ_from_its_copy(store: Store) -> None:
    for graph in (attention_graph(), store.plain("llama"), store.serving("llama")):
        found = ll.diff(graph, graph.copy())
        assert not found and found == GraphDiff() and str(found) == "no difference"
        assert "no difference" in found._repr_mimebundle_()["text/html"] and "no difference" in terminal(found)
        assert found.by_layer() == {} and found.blocks() == [] and found.tensor_lines() == []


def test_another_operator() -> None:
    def change(graph: Graph) -> None:
        node(graph, "m.y/Add").op = "Sub"

    found = edited(change)
    assert found.changed == {"m.y/Add": (Change("operator", "Add", "Sub"),)} and found.ops == {"Add": -1, "Sub": 1}
    assert not found.added and not found.removed and not found.weights and str(found) == "1 changed nodes"


def test_another_attribute() -> None:
    def change(graph: Graph) -> None:
        node(graph, "m.a/Attention").attrs.update(is_causal=0, scale=0.5)

    changes = (Change("attribute is_causal", "1", "0"), Change("attribute scale", "–", "0.5"))
    assert edited(change).changed == {"m.a/Attention": changes}


def test_inputs_that_trade_places_and_one_that_goes() -> None:
    def change(graph: Graph) -> None:
        add = node(graph, "m.y/Add")
        add.inputs = add.inputs[::-1]
        attention = node(graph, "m.a/Attention")
        attention.inputs = list(attention.inputs)[:2]

    found = edited(change).changed
    assert found["m.y/Add"] == (
        Change("input 0", "m.x/Gather", "m.a3/MatMul"),
        Change("input 1", "m.a3/MatMul", "m.x/Gather"),
    )
    assert found["m.a/Attention"] == (Change("input 2", "m.v/Transpose", "–"),) and len(found) == 2


def test_a_tensor_by_another_name_is_no_difference() -> None:
    def change(graph: Graph) -> None:
        node(graph, "m.y/Add").outputs[0].name = "renamed"

    assert not edited(change)


def test_a_shape_and_a_constant() -> None:
    def change(graph: Graph) -> None:
        node(graph, "m.y/Add").outputs[0].shape = ["batch", 7, 8]
        reshape = node(graph, "m.q1/Reshape")
        reshape.inputs[1] = gs.Constant("other", np.array([0, 0, 4, 2]))

    found = edited(change)
    assert found.changed == {
        "m.q1/Reshape": (Change("input 1", "int64 [0, 0, 2, 4]", "int64 [0, 0, 4, 2]"),),
        "m.y/Add": (Change("output 0", "float32[batch, sequence, 8]", "float32[batch, 7, 8]"),),
    }


def test_weights_that_are_renamed_added_and_of_another_type() -> None:
    def rename(graph: Graph) -> None:
        node(graph, "m.tq/Transpose").inputs[0].name = "wq2"

    found = edited(rename)
    assert found.weights == {"wq": ("float32[8, 8]", "–"), "wq2": ("–", "float32[8, 8]")}
    assert found.changed == {"m.tq/Transpose": (Change("input 0", "wq", "wq2"),)}

    def retype(graph: Graph) -> None:
        weight = node(graph, "m.tq/Transpose").inputs[0]
        node(graph, "m.tq/Transpose").inputs[0] = gs.Constant("wq", np.asarray(weight.values, np.float16))

    assert edited(retype).weights == {"wq": ("float32[8, 8]", "float16[8, 8]")} and not edited(retype).changed


def test_inputs_and_outputs_of_the_graph() -> None:
    def change(graph: Graph) -> None:
        graph.surgeon.inputs[0].shape = ["T"]
        graph.surgeon.outputs = [*graph.surgeon.outputs, node(graph, "m.x/Gather").outputs[0]]

    assert edited(change).ports == {
        "input input_ids": ("int64[batch, sequence]", "int64[T]"),
        "output x": ("–", "float32[batch, sequence, 8] of m.x/Gather"),
    }


def test_nodes_that_share_a_name_or_have_none() -> None:
    x = gs.Variable("x", np.float32, [2])
    outs = [gs.Variable(f"o{i}", np.float32, [2]) for i in range(4)]
    nodes = [gs.Node("Neg", name, {}, [x], [out]) for name, out in zip(["", "", "n", "n"], outs, strict=True)]
    graph = Graph(gs.Graph(nodes, [x], outs), CONFIG)
    assert not graph.diff(graph.copy())
    fewer = graph.copy()
    fewer.surgeon.outputs = fewer.surgeon.outputs[:3]
    fewer.surgeon.cleanup()
    assert graph.diff(fewer).removed == {"n #2": "Neg"}


def test_only_graphs_are_compared() -> None:
    with pytest.raises(InputError, match="expected two Graphs to compare, got str"):
        ll.diff(attention_graph(), "graph")  # type: ignore[arg-type]


def test_plain_serving_and_lowered(store: Store) -> None:
    """Whatever is compared, what came and went adds up."""
    plain, serving = store.plain("llama"), store.serving("llama")
    graphs = [plain, serving, lower(serving, 64)]
    for a in graphs:
        for b in graphs:
            found = diff(a, b)
            assert (
                len(b.surgeon.nodes) - len(a.surgeon.nodes)
                == len(found.added) - len(found.removed)
                == sum(found.ops.values())
            )
            assert found == GraphDiff.from_dict(found.to_dict()) and bool(found) == (a is not b)
            counts = [line for line in found._repr_mimebundle_()["text/html"].split("<details>") if "added" in line]
            assert bool(counts) == (a is not b)
    found = plain.diff(serving)
    assert found.ops["llmlab::PagedAttention"] == 2 and found.ports["input kv_cache.0"][0] == "–"
    shown = terminal(found, 100)
    assert "model.layers.0–1." in shown and "(2×)" in shown and "/PagedAttention (llmlab::PagedAttention)" in shown


def test_what_a_report_says_changed_is_the_difference(store: Store) -> None:
    """The history's diffs, one after another, lead from the plain graph to the serving graph."""
    names = {n.name for n in store.plain("llama").surgeon.nodes}
    for report in store.serving("llama").history:
        assert set(report.diff.removed) <= names and not set(report.diff.added) & names
        names = (names - set(report.diff.removed)) | set(report.diff.added)
    assert names == {n.name for n in store.serving("llama").surgeon.nodes}


def stack(layers: int, width: int) -> Graph:
    """`layers` of `width` nodes in a chain, as large as a 70B model's graph."""
    x = gs.Variable("x", np.float32, ["T", 8])
    tensor, nodes = x, []
    weight = gs.Constant("w", np.zeros((8, 8), np.float32))
    for layer in range(layers):
        for i in range(width):
            out = gs.Variable(f"t{layer}.{i}", np.float32, ["T", 8])
            nodes.append(
                gs.Node("Add", f"model.layers.{layer}.block{i % 4}/Add_{i}", {"axis": i}, [tensor, weight], [out])
            )
            tensor = out
    return Graph(gs.Graph(nodes, [x], [tensor]), CONFIG)


def test_large_graphs_are_compared_in_a_second_and_folded() -> None:
    a, b = stack(80, 110), stack(80, 110)
    assert len(a.surgeon.nodes) == 8800
    for n in b.surgeon.nodes:
        n.attrs["axis"] += 1
    began = time.process_time()
    found = a.diff(b)
    spent = time.process_time() - began
    assert len(found.changed) == 8800 and spent < 1.0, spent
    assert len(found.blocks()) == 4 and found.blocks()[0].texts[0] == "model.layers.0–79.block0"
    assert len(terminal(found).splitlines()) < 30


def test_comparing_changes_nothing() -> None:
    graph, other = attention_graph(), attention_graph("a = Attention<is_causal=0>(q, k, v)")
    before = graph.copy()
    graph.diff(other)
    same(before, graph, padded_tokens())
    assert ops(before) == ops(graph)
