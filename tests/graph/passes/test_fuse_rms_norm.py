from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph, weights

from llmlab.graph.passes.fuse_rms_norm import FuseRMSNorm

NORM = """m (float[B,S,8] x) => (float[B,S,8] y) {
    p = Constant<value_float=2.0>()
    axes = Constant<value_ints=[-1]>()
    e = Constant<value_float=0.01>()
    s = Pow(x, p)
    m = ReduceMean<keepdims=1>(s, axes)
    a = Add(m, e)
    r = Sqrt(a)
    i = Reciprocal(r)
    n = Mul(x, i)
    y = Mul(w, n)
}"""


SPELLINGS: dict[str, list[tuple[str, str]]] = {
    "llama": [],
    "x · x": [("s = Pow(x, p)", "s = Mul(x, x)")],
    "divided by the root": [("i = Reciprocal(r)\n", ""), ("n = Mul(x, i)", "n = Div(x, r)")],
    "one over the root": [("i = Reciprocal(r)", "one = Constant<value_float=1.0>() i = Div(one, r)")],
    "power of -1/2": [("r = Sqrt(a)", "h = Constant<value_float=-0.5>()"), ("i = Reciprocal(r)", "i = Pow(a, h)")],
    "power of 1/2": [("r = Sqrt(a)", "h = Constant<value_float=0.5>() r = Pow(a, h)")],
    "reciprocal first": [("r = Sqrt(a)", "r = Reciprocal(a)"), ("i = Reciprocal(r)", "i = Sqrt(r)")],
    "the root first": [("n = Mul(x, i)", "n = Mul(i, x)")],
    "gemma's 1 + w": [("y = Mul(w, n)", "one = Constant<value_float=1.0>() w1 = Add(one, w) y = Mul(n, w1)")],
    "weighed before": [("n = Mul(x, i)", "wx = Mul(w, x)"), ("y = Mul(w, n)", "y = Mul(wx, i)")],
    "weight of rank 3": [("y = Mul(w, n)", "y = Mul(w3, n)")],
    "no weight": [("n = Mul(x, i)\n    y = Mul(w, n)", "y = Mul(x, i)")],
}
GIVEN = {**weights(w=(8,)), "w3": rows(1, 1, 8)}


def spelled(changes: list[tuple[str, str]]):
    text = NORM
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return small_graph(text, **GIVEN)


@pytest.mark.parametrize("changes", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_node(changes: list[tuple[str, str]]) -> None:
    before = spelled(changes)
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and ops(after) == {"RMSNormalization": 1}
    same(before, after, {"x": rows(2, 3, 8)})


def test_another_epsilon_is_seen() -> None:
    before = spelled([])
    after, _ = apply(FuseRMSNorm, before)
    after.surgeon.nodes[0].attrs["epsilon"] = 0.02
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, after, {"x": rows(2, 3, 8)})


def test_heads_are_normed_over_head_dim() -> None:
    before = small_graph(NORM.replace("float[B,S,8]", "float[B,S,H,8]"), **weights(w=(8,)))
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and ops(after) == {"RMSNormalization": 1}
    same(before, after, {"x": rows(2, 3, 4, 8)})


def test_a_weight_for_each_head_stays_outside() -> None:
    before = small_graph(NORM.replace("float[B,S,8]", "float[B,S,4,8]"), w=rows(4, 8))
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and ops(after) == {"RMSNormalization": 1, "Mul": 1}
    same(before, after, {"x": rows(2, 3, 4, 8)})


def test_one_norm_with_two_weights_is_two_nodes() -> None:
    text = NORM.replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,8] z)").replace(
        "y = Mul(w, n)", "y = Mul(w, n) z = Mul(n, w3)"
    )
    before = small_graph(text, **GIVEN)
    after, _ = apply(FuseRMSNorm, before)
    assert ops(after) == {"RMSNormalization": 2}
    same(before, after, {"x": rows(2, 3, 8)})


def test_a_norm_that_is_also_read_without_its_weight() -> None:
    text = NORM.replace("=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,8] n)")
    before = small_graph(text, **GIVEN)
    after, _ = apply(FuseRMSNorm, before)
    assert ops(after) == {"RMSNormalization": 2}
    same(before, after, {"x": rows(2, 3, 8)})


def test_a_weight_behind_a_cast_is_taken() -> None:
    text = NORM.replace("y = Mul(w, n)", "u = Cast<to=1>(w) y = Mul(u, n)")
    before = small_graph(text, fold=True, w=weights(w=(8,))["w"].astype(np.float16))
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and "RMSNormalization" in ops(after)
    same(before, after, {"x": rows(2, 3, 8)})


WIDE = """m (float16[B,S,8] x) => (float16[B,S,8] y) {
    p = Constant<value_float=2.0>()
    axes = Constant<value_ints=[-1]>()
    e = Constant<value_float=0.01>()
    c = Cast<to=1>(x)
    s = Pow(c, p)
    m = ReduceMean<keepdims=1>(s, axes)
    a = Add(m, e)
    r = Sqrt(a)
    i = Reciprocal(r)
    n = Mul(c, i)
    TAIL
}"""


@pytest.mark.parametrize(
    ("tail", "weight", "left"),
    [
        ("h = Cast<to=10>(n) y = Mul(w, h)", np.float16, {"RMSNormalization": 1}),  # llama: rounded, then weighed
        ("t = Mul(w, n) y = Cast<to=10>(t)", np.float32, {"Cast": 2, "RMSNormalization": 1}),  # gemma: weighed wide
        ("y = Cast<to=10>(n)", np.float32, {"Cast": 2, "RMSNormalization": 1}),
    ],
)
def test_half_precision_normed_in_float32_rounds_where_it_did(tail: str, weight: type, left: dict[str, int]) -> None:
    before = small_graph(WIDE.replace("TAIL", tail), w=weights(w=(8,))["w"].astype(weight))
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and ops(after) == left
    same(before, after, {"x": rows(2, 3, 8).astype(np.float16)}, tolerance=1e-3)


def test_a_type_between_norm_and_weight_that_neither_has_is_refused() -> None:
    before = small_graph(
        WIDE.replace("TAIL", "h = Cast<to=11>(n) t = Mul(w, h) y = Cast<to=10>(t)"),
        w=weights(w=(8,))["w"].astype(np.float64),
    )
    assert refused(FuseRMSNorm, before) == "it is rounded to float64 before it is weighed"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[-1]", "[1]", "the mean is not over the last axis with keepdims"),
        ("a = Add(m, e)", "a = Max(m, e)", "no constant ε is added to the mean"),
        ("a = Add(m, e)\n    r = Sqrt(a)", "r0 = Sqrt(m) r = Add(r0, e)", "no constant ε is added to the mean"),
        ("i = Reciprocal(r)", "i0 = Reciprocal(r) i = Add(i0, e)", "mean + ε is not used as x / sqrt(·)"),
        ("n = Mul(x, i)", "n = Mul(x, r)", "mean + ε is not used as x / sqrt(·)"),
        ("n = Mul(x, i)", "n = Div(r, x)", "mean + ε is not used as x / sqrt(·)"),
        ("n = Mul(x, i)", "z = Neg(x) n = Mul(z, i)", "what mean + ε divides is not x"),
        ("n = Mul(x, i)", "z = Mul(x, x) n = Mul(z, i)", "what mean + ε divides is not x"),
        ("n = Mul(x, i)", "n0 = Mul(x, i) q = Neg(i) n = Mul(n0, q)", "mean + ε is not used as x / sqrt(·)"),
    ],
)
def test_anything_else_is_refused(old: str, new: str, reason: str) -> None:
    assert refused(FuseRMSNorm, spelled([(old, new)])) == reason


@pytest.mark.parametrize("tail", ["y = Add(w, n)", "y = Mul(x, n)"])
def test_what_is_no_weight_stays_outside(tail: str) -> None:
    before = spelled([("y = Mul(w, n)", tail)])
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and ops(after)["RMSNormalization"] == 1 and len(after.surgeon.nodes) == 2
    same(before, after, {"x": rows(2, 3, 8)})


def test_no_square_no_match() -> None:
    _, report = apply(FuseRMSNorm, spelled([("2.0", "3.0")]))
    assert report.matches == 0
