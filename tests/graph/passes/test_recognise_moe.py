"""Gathered expert weights become one node, by what the gate computes and not by how it is written."""

from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, run, same, small_graph, weights

from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.lower.onnxruntime_moe import lower_experts
from llmlab.graph.passes.recognise_moe import RecogniseMoE

# 3 experts of 6 · 2 columns, 2 chosen, hidden 4, 5 tokens. `{gate}` makes g [10,6] of p [10,12].
MODEL = """m (float[5,4] x) => (float[5,4] y) {{
    router = Constant<value_ints=[-1]>()
    two = Constant<value_ints=[2]>()
    one = Constant<value_ints=[1]>()
    last = Constant<value_ints=[2]>()
    end = Constant<value_ints=[-1]>()
    repeats = Constant<value_ints=[1, 2, 1]>()
    many = Constant<value_ints=[10, 4]>()
    few = Constant<value_ints=[5, 2, 4]>()
    scores = MatMul(x, route)
    probs = Softmax(scores)
    top, index = TopK(probs, two)
    x1 = Unsqueeze(x, one)
    x2 = Expand(x1, repeats)
    x3 = Reshape(x2, many)
    flat = Reshape(index, end)
    column = Unsqueeze(flat, end)
    w1 = GatherND(gate_up, column)
    w2 = GatherND(down, column)
    {products}
    o = Reshape(top, end)
    o1 = Unsqueeze(o, end)
    weighted = Mul(e, o1)
    apart = Reshape(weighted, few)
    y = ReduceSum<keepdims=0>(apart, {axis})
}}"""
ROWS = """
    xr = Unsqueeze(x3, last)
    p1 = MatMul(w1, xr)
    p = Squeeze(p1, last)
    {gate}
    gr = Unsqueeze(g, last)
    e1 = MatMul(w2, gr)
    e = Squeeze(e1, last)"""
COLUMNS = """
    b1 = GatherND(up_bias, column)
    b2 = GatherND(down_bias, column)
    xr = Unsqueeze(x3, one)
    p1 = MatMul(xr, w1)
    p2 = Squeeze(p1, one)
    p = Add(p2, b1)
    {gate}
    gr = Unsqueeze(g, one)
    e1 = MatMul(gr, w2)
    e2 = Squeeze(e1, one)
    e = Add(e2, b2)"""
HALVES = "a, b = Split<axis=-1, num_outputs=2>(p)"
SILU = HALVES + " s = Sigmoid(a) t = Mul(s, a) g = Mul(t, b)"
GELU = HALVES + " t = Gelu(a) g = Mul(b, t)"
CLIPPED = """zero = Constant<value_ints=[0]>() big = Constant<value_ints=[100]>()
    high = Constant<value_float=0.5>() low = Constant<value_float=-0.5>() slope = Constant<value_float=1.7>() unit = Constant<value_float=1.0>()
    a0 = Slice(p, zero, big, one, two) b0 = Slice(p, one, big, one, two)
    a = Min(a0, high) b = Clip(b0, low, high) as = Mul(a, slope) s = Sigmoid(as) t = Mul(a, s) b1p = Add(b, unit) g = Mul(b1p, t)"""


def graph(gate: str = SILU, *, columns: bool = False, axis: str = "one") -> Graph:
    text = MODEL.format(products=(COLUMNS if columns else ROWS).format(gate=gate), axis=axis)
    first, second = ((3, 4, 12), (3, 6, 4)) if columns else ((3, 12, 4), (3, 4, 6))
    given = weights(gate_up=first, down=second, up_bias=(3, 12), down_bias=(3, 4), route=(4, 3))
    if not columns:
        del given["up_bias"], given["down_bias"]
    return small_graph(text, **given)


@pytest.mark.parametrize(
    ("gate", "columns", "attrs"),
    [
        (
            SILU,
            False,
            {"activation": "silu", "interleaved": 0, "transposed": 0, "limit": 0.0, "alpha": 1.0, "beta": 0.0},
        ),
        (
            SILU,
            True,
            {"activation": "silu", "interleaved": 0, "transposed": 1, "limit": 0.0, "alpha": 1.0, "beta": 0.0},
        ),
        (
            GELU,
            True,
            {"activation": "gelu", "interleaved": 0, "transposed": 1, "limit": 0.0, "alpha": 1.0, "beta": 0.0},
        ),
        (
            CLIPPED,
            True,
            {"activation": "silu", "interleaved": 1, "transposed": 1, "limit": 0.5, "alpha": 1.7, "beta": 1.0},
        ),
    ],
)
def test_experts_become_one_node(gate: str, columns: bool, attrs: dict) -> None:
    before = graph(gate, columns=columns)
    after, report = apply(RecogniseMoE, before)
    assert report.rewrites == 1 and not report.near_misses
    assert ops(after) == {"MatMul": 1, "Softmax": 1, "TopK": 1, "MixtureOfExperts": 1}
    (node,) = (n for n in after.surgeon.nodes if n.op == "MixtureOfExperts")
    assert node.attrs == {k: pytest.approx(v) for k, v in attrs.items()} | {"activation": attrs["activation"]}
    assert len(node.inputs) == (7 if columns else 5)
    lower_experts(Editor(after))
    after.surgeon.cleanup().toposort()
    same(before, after, {"x": rows(5, 4) * 2}, 2e-5)


def test_a_gate_that_is_none_we_know_stays() -> None:
    before = graph(HALVES + " t = Tanh(a) g = Mul(t, b)")
    assert refused(RecogniseMoE, before) == "the gate between the products (Mul, Split, Tanh) is none that is known"
    assert np.isfinite(run(before, {"x": rows(5, 4)})[0]).all()


@pytest.mark.parametrize(
    ("change", "columns", "reason"),
    [
        (
            ("ReduceSum<keepdims=0>(apart, one)", "ReduceSum<keepdims=0>(apart, last)"),
            False,
            "the sum does not run over",
        ),
        (("t = Mul(s, a)", "t = Mul(p, p) a9 = Mul(s, a)"), False, "none that is known"),
        (("w2 = GatherND(down, column)", "odd = Abs(column) w2 = GatherND(down, odd)"), False, None),
        (
            ("o1 = Unsqueeze(o, end)", "o0 = Abs(o) o1 = Unsqueeze(o0, end)"),
            False,
            "the routing weights are not a flattened",
        ),
        (
            ("x3 = Reshape(x2, many)", "x9 = Reshape(x2, many) x3 = Abs(x9)"),
            False,
            "not each token's row repeated k times",
        ),
        (("s = Sigmoid(a)", "z = CumSum(a, router) s = Sigmoid(z)"), False, "(CumSum) is no part of a gate"),
    ],
)
def test_what_is_only_similar_stays(change: tuple[str, str], columns: bool, reason: str | None) -> None:
    text = MODEL.format(products=ROWS.format(gate=SILU), axis="one")
    assert change[0] in text
    given = weights(gate_up=(3, 12, 4), down=(3, 4, 6), route=(4, 3))
    text = text.replace(*change).replace("router = Constant<value_ints=[-1]>()", "router = Constant<value_int=1>()")
    if "last)" in change[1]:
        text = text.replace("float[5,4] y", "float[5,2] y")
    if "Mul(p, p)" in change[1]:
        text = text.replace("g = Mul(t, b)", "tt, t2 = Split<axis=-1, num_outputs=2>(t) g = Mul(tt, b)")
    before = small_graph(text, **given)
    if reason is None:
        _, report = apply(RecogniseMoE, before)
        assert (report.matches, report.rewrites) == (0, 0)
    else:
        assert reason in refused(RecogniseMoE, before)
