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


@pytest.mark.parametrize("square", ["s = Pow(x, p)", "s = Mul(x, x)"])
def test_primitives_become_one_node(square: str) -> None:
    before = small_graph(NORM.replace("s = Pow(x, p)", square), **weights(w=(8,)))
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and ops(after) == {"RMSNormalization": 1}
    same(before, after, {"x": rows(2, 3, 8)})


def test_a_weight_behind_a_cast_is_taken() -> None:
    text = NORM.replace("y = Mul(w, n)", "u = Cast<to=1>(w) y = Mul(u, n)")
    before = small_graph(text, fold=True, w=weights(w=(8,))["w"].astype(np.float16))
    after, report = apply(FuseRMSNorm, before)
    assert report.rewrites == 1 and "RMSNormalization" in ops(after)
    same(before, after, {"x": rows(2, 3, 8)})


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[-1]", "[1]", "the mean is not over the last axis with keepdims"),
        ("a = Add(m, e)", "a = Max(m, e)", "no constant ε is added to the mean"),
        ("n = Mul(x, i)", "z = Neg(x) n = Mul(z, i)", "mean + ε is not used as x · reciprocal(sqrt(·))"),
        ("y = Mul(w, n)", "y = Add(w, n)", "no constant weight of shape [8] multiplies the result"),
        ("y = Mul(w, n)", "y = Mul(x, n)", "no constant weight of shape [8] multiplies the result"),
        (
            "n = Mul(x, i)",
            "n0 = Mul(x, i) q = Neg(i) n = Mul(n0, q)",
            "mean + ε is not used as x · reciprocal(sqrt(·))",
        ),
    ],
)
def test_anything_else_is_refused(old: str, new: str, reason: str) -> None:
    before = small_graph(NORM.replace(old, new), **weights(w=(8,)))
    assert refused(FuseRMSNorm, before) == reason


def test_no_square_no_match() -> None:
    before = small_graph(NORM.replace("2.0", "3.0"), **weights(w=(8,)))
    _, report = apply(FuseRMSNorm, before)
    assert report.matches == 0
