from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from small_graphs import apply, ops, refused, rows, run, same, small_graph

from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import GatedActivation
from llmlab.graph.lower.gated import expand_gated
from llmlab.graph.passes.fuse_gated_activation import FuseGatedActivation

GATED = """m (float[T,16] x) => (float[T,8] y) {
    sizes = Constant<value_ints=[8, 8]>()
    q = Constant<value_float=1.702>()
    g, u = Split<axis=-1>(x, sizes)
    ACT
    y = Mul(a, u)
}"""
KINDS: dict[str, tuple[str, str, float]] = {
    "SwiGLU": ("s = Sigmoid(g) a = Mul(g, s)", "silu", 1.0),
    "quick": ("qg = Mul(g, q) s = Sigmoid(qg) a = Mul(g, s)", "silu", 1.702),
    "GeGLU": ("a = Gelu(g)", "gelu", 1.0),
    "GeGLU, tanh": ('a = Gelu<approximate="tanh">(g)', "gelu_tanh", 1.0),
    "ReGLU": ("a = Relu(g)", "relu", 1.0),
    "GLU": ("a = Sigmoid(g)", "sigmoid", 1.0),
}
FEEDS = {"x": rows(5, 16) * 3}


def expanded(graph: Graph) -> Graph:
    result = graph.copy()
    expand_gated(Editor(result))
    result.surgeon.cleanup().toposort()
    return result


@pytest.mark.parametrize(("act", "kind", "alpha"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_the_gated_product_is_one_node(act: str, kind: str, alpha: float, gate_first: bool) -> None:
    text = GATED.replace("ACT", act)
    before = small_graph(text if gate_first else text.replace("g, u = Split", "u, g = Split"))
    after, report = apply(FuseGatedActivation, before)
    assert report.rewrites == 1 and ops(after) == {"GatedActivation": 1}
    assert after.surgeon.nodes[0].attrs == {"activation": kind, "alpha": alpha, "gate_first": int(gate_first)}
    (expected,) = run(before, FEEDS)
    (found,) = ReferenceEvaluator(after.to_onnx(), new_ops=[GatedActivation]).run(None, FEEDS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    same(before, expanded(after), FEEDS)
    after.surgeon.nodes[0].attrs["gate_first"] = int(not gate_first)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, expanded(after), FEEDS)


def test_the_other_order_of_the_product() -> None:
    before = small_graph(GATED.replace("ACT", KINDS["SwiGLU"][0]).replace("Mul(a, u)", "Mul(u, a)"))
    after, report = apply(FuseGatedActivation, before)
    assert report.rewrites == 1 and ops(after) == {"GatedActivation": 1}
    same(before, expanded(after), FEEDS)


def test_halves_that_are_read_elsewhere_stay() -> None:
    text = GATED.replace("ACT", KINDS["SwiGLU"][0]).replace("(float[T,8] y)", "(float[T,8] y, float[T,8] u)")
    before = small_graph(text)
    after, _ = apply(FuseGatedActivation, before)
    assert ops(after) == {"GatedActivation": 1, "Split": 1}
    same(before, expanded(after), FEEDS)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("float[T,16] x", "float[16,16] x", "the product is not split along its last axis"),
        ("[8, 8]", "[15, 1]", "the two parts have shapes ['T', 15] and ['T', 1]"),
    ],
)
def test_other_halves_are_refused(old: str, new: str, reason: str) -> None:
    text = GATED.replace("ACT", KINDS["SwiGLU"][0]).replace(old, new)
    if "axis" in reason:
        text = text.replace("axis=-1", "axis=0").replace("(float[T,8] y)", "(float[8,16] y)")
    else:
        text = text.replace("(float[T,8] y)", "(float[T,15] y)")
    assert refused(FuseGatedActivation, small_graph(text)) == reason


@pytest.mark.parametrize("act", ["a = Tanh(g)", "s = Exp(u) a = Mul(g, s)", "a = Identity(g)"])
def test_other_products_are_no_match(act: str) -> None:
    _, report = apply(FuseGatedActivation, small_graph(GATED.replace("ACT", act)))
    assert report.matches == 0
