"""Excerpts of graphs from strangers: as many nodes as ONNX Runtime takes in within seconds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llmlab.files import EXCERPT_LIMIT
from llmlab.graph.analysis.bounded import BoundedSession, CannotEvaluate


def model(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(nodes, "excerpt", [x], [y], [yes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def chain(count: int) -> list[onnx.NodeProto]:
    names = ["x", *(f"n{i}" for i in range(count - 1)), "y"]
    return [helper.make_node("Neg", [names[i]], [names[i + 1]]) for i in range(count)]


def nested(levels: int) -> list[onnx.NodeProto]:
    """2^levels − 1 nodes, all but one of them inside another."""
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    for level in range(levels - 1):
        name = f"y{level}"
        nodes[0].output[0] = name
        inner = helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
        nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)]
    return nodes


@pytest.mark.parametrize("nodes", [chain(EXCERPT_LIMIT + 1), nested(14)], ids=["a chain", "inside each other"])
def test_more_nodes_than_that_are_not_evaluated(nodes: list[onnx.NodeProto]) -> None:
    with pytest.raises(CannotEvaluate, match=f"more than {EXCERPT_LIMIT} nodes"):
        BoundedSession(model(nodes))


@pytest.mark.parametrize("nodes", [chain(2001), nested(8)], ids=["a chain", "inside each other"])
def test_so_many_are(nodes: list[onnx.NodeProto]) -> None:
    (y,) = BoundedSession(model(nodes)).run({"x": np.array([1, 2], np.float32)})
    assert y.tolist() == [-1, -2]
