"""What a graph's history and nodes look like in a notebook."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.config import ModelConfig
from llmlab.graph.graph import Graph
from llmlab.graph.reports.diff import GraphDiff
from llmlab.graph.reports.report import History, NearMiss, PassReport
from llmlab.graph.reports.tables import NodeTable


def graph() -> Graph:
    x, y = gs.Variable("x", np.float32, [2, "sequence"]), gs.Variable("y", np.float32, [2, 3])
    weight = gs.Constant("model.layers.1.mlp.weight", np.zeros((3, 3), np.float32))
    nodes = [
        gs.Node("MatMul", "model.layers.1.mlp/MatMul", {}, [x, weight], [y]),
        gs.Node("Relu", "model.layers.10.mlp/Relu", {}, [y], [gs.Variable("<z>", np.float32)]),
    ]
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 3,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "max_position_embeddings": 16,
        }
    )
    return Graph(gs.Graph(nodes, [x], [nodes[1].outputs[0]]), config)


def test_nodes_of_a_module_are_not_those_of_one_with_a_longer_number() -> None:
    found = graph()
    assert [n.op for n in found.nodes()] == ["MatMul", "Relu"]
    assert [n.op for n in found.nodes("model.layers.1")] == ["MatMul"]
    assert [n.op for n in found.nodes("model.layers.10.mlp")] == ["Relu"]
    assert found.nodes("model.layers.2") == [] and str(found.nodes("model.layers.2")) == "no nodes"


def test_node_table_names_weights_and_gives_shapes_between_nodes() -> None:
    shown = graph().nodes()._repr_mimebundle_()
    assert "model.layers.1.mlp.weight [3, 3]" in shown["text/html"] and "x [2, sequence]" in shown["text/html"]
    assert "<small>[2, 3]</small>" in shown["text/html"], "a value between nodes has a shape and no name"
    assert "<z>" not in shown["text/html"], "names of the model are escaped or left out"
    assert shown["text/plain"].splitlines()[0].split() == ["MatMul", "model.layers.1.mlp/MatMul"]


def test_history_shows_every_pass_its_operators_and_its_near_misses() -> None:
    report = PassReport(
        "fuse <x>", "Does it.", 3, 2, (NearMiss("a/Mul", "5 < 6"),), 9, 7, 0.25, GraphDiff(ops={"Mul": -2, "Add": 1})
    )
    history = History([report, report])
    html = history._repr_mimebundle_()["text/html"]
    assert html.count("fuse &lt;x&gt;") == 2 and "Mul -2, Add +1" in html and "not a/Mul: 5 &lt; 6" in html
    assert "2 of 3" in html and "9 → 7" in html and "0.25 s" in html
    assert str(history) == f"{report}\n{report}" == repr(history)
    assert report._repr_mimebundle_()["text/html"].count("fuse &lt;x&gt;") == 1
    assert len(repr(report)) < 300, "the diff stays out of the repr: it lists every node"


def test_a_graph_keeps_its_history_as_one() -> None:
    found = graph()
    assert str(found.history) == "no pass has run"
    found.history.append(PassReport("p", "", 1, 1))
    assert isinstance(found.copy().history, History) and len(found.copy().history) == 1
    assert isinstance(found.nodes(), NodeTable)
