from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph, weights

from llmlab.graph.passes.fuse_layer_norm import FuseLayerNorm
from llmlab.graph.passes.fuse_rms_norm import FuseRMSNorm
from llmlab.graph.passes.share_common import ShareCommon

NORM = """m (float[B,S,8] x) => (float[B,S,8] y) {
    p = Constant<value_float=2.0>()
    axes = Constant<value_ints=[-1]>()
    e = Constant<value_float=0.01>()
    u = ReduceMean<keepdims=1>(x, axes)
    d = Sub(x, u)
    s = Pow(d, p)
    v = ReduceMean<keepdims=1>(s, axes)
    a = Add(v, e)
    r = Sqrt(a)
    n = Div(d, r)
    t = Mul(n, w)
    y = Add(t, b)
}"""
GIVEN = weights(w=(8,), b=(8,))
SPELLINGS: dict[str, list[tuple[str, str]]] = {
    "divided by the root": [],
    "d · d": [("s = Pow(d, p)", "s = Mul(d, d)")],
    "rsqrt": [("n = Div(d, r)", "i = Reciprocal(r) n = Mul(i, d)")],
    "power of -1/2": [("r = Sqrt(a)", "h = Constant<value_float=-0.5>() r = Pow(a, h)"), ("Div(d, r)", "Mul(d, r)")],
    "no bias": [("t = Mul(n, w)\n    y = Add(t, b)", "y = Mul(w, n)")],
    "no weight": [("t = Mul(n, w)\n    y = Add(t, b)", "y = Add(b, n)")],
    "neither": [("n = Div(d, r)\n    t = Mul(n, w)\n    y = Add(t, b)", "y = Div(d, r)")],
    "weighed before": [("n = Div(d, r)\n    t = Mul(n, w)", "wd = Mul(d, w) t = Div(wd, r)")],
}


def spelled(changes: list[tuple[str, str]]):
    text = NORM
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return small_graph(text, **GIVEN)


@pytest.mark.parametrize("changes", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_node(changes: list[tuple[str, str]]) -> None:
    before = spelled(changes)
    after, report = apply(FuseLayerNorm, before)
    assert report.rewrites == 1 and ops(after) == {"LayerNormalization": 1}
    same(before, after, {"x": rows(2, 3, 8) + 3})


def test_a_norm_without_its_mean_is_seen() -> None:
    """RMSNorm of x, and not of x - mean, is something else; the tolerance tells."""
    before = spelled([])
    wrong, _ = apply(FuseRMSNorm, spelled([("d = Sub(x, u)", "d = Identity(x)")]))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, wrong, {"x": rows(2, 3, 8) + 3})


def test_cohere_subtracts_the_mean_twice() -> None:
    before = spelled([("n = Div(d, r)", "d2 = Sub(x, u) n = Div(d2, r)")])
    shared, _ = apply(ShareCommon, before)
    after, report = apply(FuseLayerNorm, shared)
    assert report.rewrites == 1 and ops(after) == {"LayerNormalization": 1}
    same(before, after, {"x": rows(2, 3, 8)})


WIDE = """m (float16[B,S,8] x) => (float16[B,S,8] y) {
    p = Constant<value_float=2.0>()
    axes = Constant<value_ints=[-1]>()
    e = Constant<value_float=0.01>()
    c = Cast<to=1>(x)
    u = ReduceMean<keepdims=1>(c, axes)
    d = Sub(c, u)
    s = Pow(d, p)
    v = ReduceMean<keepdims=1>(s, axes)
    a = Add(v, e)
    r = Sqrt(a)
    n = Div(d, r)
    TAIL
}"""


@pytest.mark.parametrize(
    ("tail", "weight", "left"),
    [
        ("h = Cast<to=10>(n) t = Mul(h, w) y = Add(t, b)", np.float16, {"LayerNormalization": 1}),  # deberta
        ("t = Mul(n, w) y = Cast<to=10>(t)", np.float32, {"Cast": 2, "LayerNormalization": 1}),  # cohere
    ],
)
def test_half_precision_normed_in_float32(tail: str, weight: type, left: dict[str, int]) -> None:
    given = {k: v.astype(weight) for k, v in GIVEN.items()}
    before = small_graph(WIDE.replace("TAIL", tail), **given)
    after, report = apply(FuseLayerNorm, before)
    assert report.rewrites == 1 and ops(after) == left
    same(before, after, {"x": rows(2, 3, 8).astype(np.float16)}, tolerance=2e-3)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("u = ReduceMean<keepdims=1>(x, axes)", "one = Constant<value_ints=[1]>() u = ReduceMean<keepdims=1>(x, one)",
         "a mean is not over the last axis with keepdims"),
        ("a = Add(v, e)\n    r = Sqrt(a)", "r0 = Sqrt(v) r = Add(r0, e)", "no constant ε is added to the mean"),
        # the unbiased variance of torch's x.var(-1)
        ("a = Add(v, e)", "k = Constant<value_float=1.142857>() v1 = Mul(v, k) a = Add(v1, e)", "no constant ε is added to the mean"),
        ("n = Div(d, r)", "n = Div(x, r)", "what mean + ε divides is not d"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(old: str, new: str, reason: str) -> None:
    assert refused(FuseLayerNorm, spelled([(old, new)])) == reason


@pytest.mark.parametrize("change", [("d = Sub(x, u)", "d = Sub(u, x)"), ("d = Sub(x, u)", "z = Neg(x) d = Sub(z, u)")])
def test_another_mean_no_match(change: tuple[str, str]) -> None:
    _, report = apply(FuseLayerNorm, spelled([change]))
    assert report.matches == 0
