from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_graphs import apply, ops, refused, same, small_graph

from llmlab.graph.passes.fuse_activation import FuseActivation

FEEDS = {"x": np.linspace(-8, 8, 40, dtype=np.float32).reshape(5, 8)}
ERF = {"Gelu": 1}
SILU = {"Sigmoid": 1, "Mul": 1}
CONSTANTS = """
    half = Constant<value_float=0.5>()
    one = Constant<value_float=1.0>()
    two = Constant<value_float=2.0>()
    three = Constant<value_float=3.0>()
    r = Constant<value_float=1.41421356>()
    ri = Constant<value_float=0.70710678>()
    c = Constant<value_float=0.044715>()
    k = Constant<value_float=0.7978845608>()
    q = Constant<value_float=1.702>()
"""
TANH = "p = Pow(x, three) cp = Mul(p, c) s = Add(x, cp) ks = Mul(s, k) t = Tanh(ks) t1 = Add(t, one)"
SPELLINGS: dict[str, tuple[str, dict[str, int], str]] = {
    "erf": ("d = Div(x, r) e = Erf(d) e1 = Add(e, one) xe = Mul(x, e1) y = Mul(xe, half)", ERF, "none"),
    "erf, x / 2 first": ("h = Mul(half, x) d = Mul(x, ri) e = Erf(d) e1 = Add(one, e) y = Mul(h, e1)", ERF, "none"),
    "erf, of Φ": ("d = Mul(x, ri) e = Erf(d) e1 = Add(one, e) h = Div(e1, two) y = Mul(x, h)", ERF, "none"),
    "gpt2": (f"h = Mul(x, half) {TANH} y = Mul(h, t1)", ERF, "tanh"),
    "tanh, half last": (f"{TANH} h = Mul(x, t1) y = Mul(half, h)", ERF, "tanh"),
    "fast": (
        "xx = Mul(x, x) cx = Mul(xx, c) i = Add(cx, one) kx = Mul(x, k) ki = Mul(kx, i) t = Tanh(ki) t1 = Add(t, one) "
        "h = Mul(x, half) y = Mul(h, t1)", ERF, "tanh"),
    "silu by exp": ("n = Neg(x) e = Exp(n) e1 = Add(e, one) y = Div(x, e1)", SILU, ""),
    "silu by 1 / (1 + exp)": ("n = Neg(x) e = Exp(n) e1 = Add(one, e) s = Reciprocal(e1) y = Mul(s, x)", SILU, ""),
    "quick gelu by exp": ("n = Neg(x) qn = Mul(n, q) e = Exp(qn) e1 = Add(e, one) y = Div(x, e1)", {"Sigmoid": 1, "Mul": 2}, ""),
}  # fmt: skip


def graph(body: str):
    return small_graph(f"m (float[T,8] x) => (float[T,8] y) {{ {CONSTANTS} {body} }}")


@pytest.mark.parametrize(("body", "left", "approximate"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling(body: str, left: dict[str, int], approximate: str) -> None:
    before = graph(body)
    after, report = apply(FuseActivation, before)
    assert report.rewrites == 1 and not report.near_misses and ops(after) == left
    if approximate:
        assert after.surgeon.nodes[0].attrs["approximate"] == approximate
    same(before, after, FEEDS)


def test_the_other_approximation_is_seen() -> None:
    before = graph(SPELLINGS["erf"][0])
    after, _ = apply(FuseActivation, before)
    after.surgeon.nodes[0].attrs["approximate"] = "tanh"
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, after, FEEDS)


def test_an_argument_that_is_elementwise_itself() -> None:
    before = graph("x2 = Mul(x, two) a = Add(x2, one) " + SPELLINGS["gpt2"][0].replace("(x,", "(a,"))
    after, report = apply(FuseActivation, before)
    assert report.rewrites == 1 and ops(after) == {"Mul": 1, "Add": 1, "Gelu": 1}
    same(before, after, FEEDS)


@pytest.mark.parametrize(
    "body", ["s = Sigmoid(x) y = Mul(x, s)", "qx = Mul(q, x) s = Sigmoid(qx) y = Mul(s, x)", "y = Mul(x, x)"]
)
def test_what_needs_no_rewrite_is_no_match(body: str) -> None:
    _, report = apply(FuseActivation, graph(body))
    assert report.matches == 0


@pytest.mark.parametrize(
    "change",
    [
        ("c = Constant<value_float=0.044715>()", "c = Constant<value_float=0.0447>()"),
        ("value_float=0.5", "value_float=0.51"),
        ("Tanh(ks)", "Erf(ks)"),
    ],
)
def test_another_curve_is_refused(change: tuple[str, str]) -> None:
    text = f"m (float[T,8] x) => (float[T,8] y) {{ {CONSTANTS} {SPELLINGS['gpt2'][0]} }}"
    assert change[0] in text
    assert (
        refused(FuseActivation, small_graph(text.replace(*change)))
        == "as a function of x it is no activation known here"
    )


def test_a_curve_of_something_else_is_no_activation() -> None:
    before: Any = small_graph(
        f"m (float[T,8] x, float[T,8] z) => (float[T,8] y) {{ {CONSTANTS} {SPELLINGS['gpt2'][0].replace('Tanh(ks)', 'Tanh(kz)')} }}".replace(
            "ks = Mul(s, k)", "kz = Mul(z, s)"
        )
    )
    assert refused(FuseActivation, before) == "as a function of x it is no activation known here"
