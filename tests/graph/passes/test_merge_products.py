from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, attention_graph, ops, padded_tokens, refused, rows, same, small_graph, weights

from llmlab.graph.passes.merge_products import MergeProducts

THREE = """m (float[T,8] x) => (float[T,6] y) {
    ta = Transpose<perm=[1,0]>(wa)
    tb = Transpose<perm=[1,0]>(wb)
    a0 = MatMul(x, ta)
    b0 = MatMul(x, tb)
    a = Add(a0, ba)
    b = Add(bb, b0)
    y = Mul(a, b)
}"""
GIVEN = weights(wa=(6, 8), wb=(6, 8), ba=(6,), bb=(6,))


def graph(*changes: tuple[str, str], **more: np.ndarray):
    text = THREE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    result = small_graph(text, **{**GIVEN, **more})
    for node in result.surgeon.nodes:  # as siblings of one module: m.a_proj, m.b_proj
        node.name = node.name.replace("m.", "layer.")
    return result


def test_products_of_the_same_rows_become_one() -> None:
    before = graph()
    after, report = apply(MergeProducts, before)
    assert report.rewrites == 1
    assert ops(after) == {"Concat": 2, "Transpose": 1, "MatMul": 1, "Add": 1, "Split": 1, "Mul": 1}
    same(before, after, {"x": rows(5, 8)})


def test_products_without_bias() -> None:
    before = graph(("a = Add(a0, ba)", "a = Neg(a0)"), ("b = Add(bb, b0)", "b = Exp(b0)"))
    after, report = apply(MergeProducts, before)
    assert report.rewrites == 1 and ops(after)["MatMul"] == 1
    same(before, after, {"x": rows(5, 8)})


def test_q_k_v_of_different_widths() -> None:
    before = attention_graph()
    after, report = apply(MergeProducts, before)
    assert report.rewrites == 1 and ops(after)["MatMul"] == 3, "qkv, o, head"
    split = next(n for n in after.surgeon.nodes if n.op == "Split")
    assert [t.shape[-1] for t in split.outputs] == [8, 4, 4]
    same(before, after, padded_tokens())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("b = Add(bb, b0)", "b = Neg(b0)", "some of the products have a bias and some have none"),
        (
            "tb = Transpose<perm=[1,0]>(wb)",
            "wh = Cast<to=10>(wb) tb0 = Transpose<perm=[1,0]>(wh) tb = Cast<to=1>(tb0)",
            None,
        ),
        ("=> (float[T,6] y)", "=> (float[T,6] y, float[T,6] a)", "one of the products is an output"),
    ],
)
def test_unlike_products_stay_apart(old: str, new: str, reason: str | None) -> None:
    before = graph((old, new))
    if reason is None:
        after, report = apply(MergeProducts, before)
        assert report.matches == 0 and ops(after) == ops(before)
    else:
        assert refused(MergeProducts, before) == reason


def test_products_of_other_modules_stay_apart() -> None:
    before = graph()
    next(n for n in before.surgeon.nodes if n.name == "layer.b0/MatMul").name = "other.b0/MatMul"
    assert refused(MergeProducts, before).startswith("they belong to different modules: layer.a0, other.b0")


@pytest.mark.parametrize(
    "change",
    [
        ("b0 = MatMul(x, tb)", "x2 = Neg(x) b0 = MatMul(x2, tb)"),
        ("tb = Transpose<perm=[1,0]>(wb)", "tb = Identity(square)"),
    ],
)
def test_products_of_other_rows_or_weights_of_another_layout_are_no_match(change: tuple[str, str]) -> None:
    _, report = apply(MergeProducts, graph(change, square=rows(8, 6)))
    assert report.matches == 0


PLAIN = """m (float[T,8] x) => (float[T,6] y) {
    a0 = MatMul(x, ka)
    b0 = MatMul(x, kb)
    a = Add(a0, ba)
    b = Add(bb, b0)
    y = Mul(a, b)
}"""


def test_weights_that_are_stored_the_other_way_round() -> None:
    """gpt2's Conv1D holds [K, N]; nothing turns it."""
    before = small_graph(PLAIN, **weights(ka=(8, 6), kb=(8, 6), ba=(6,), bb=(6,)))
    for node in before.surgeon.nodes:
        node.name = node.name.replace("m.", "layer.")
    after, report = apply(MergeProducts, before)
    assert report.rewrites == 1
    assert ops(after) == {"Concat": 2, "MatMul": 1, "Add": 1, "Split": 1, "Mul": 1}
    same(before, after, {"x": rows(5, 8)})


def test_attention_and_mlp_side_by_side_merge_each_for_itself() -> None:
    """phi, falcon and gpt_neox feed both from one norm."""
    text = PLAIN.replace("y = Mul(a, b)", "c = MatMul(x, kc) ab = Mul(a, b) y = Mul(ab, c)")
    before = small_graph(text, **weights(ka=(8, 6), kb=(8, 6), kc=(8, 6), ba=(6,), bb=(6,)))
    for node in before.surgeon.nodes:
        node.name = node.name.replace("m.c/", "layer.mlp.c/").replace("m.", "layer.attn.")
    after, report = apply(MergeProducts, before)
    assert report.rewrites == 1 and ops(after)["MatMul"] == 2 and ops(after)["Split"] == 1
    same(before, after, {"x": rows(5, 8)})
