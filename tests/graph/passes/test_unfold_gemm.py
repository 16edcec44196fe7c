from __future__ import annotations

import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph, weights

from llmlab.graph.linear import linear
from llmlab.graph.passes.unfold_gemm import UnfoldGemm

GIVEN = {**weights(w=(8, 6), wt=(6, 8), b=(6,)), "b2": rows(1, 6), "c": rows(3, 6), "s": rows(1)}


def graph(gemm: str):
    return small_graph(f"m (float[T,8] x, float[8,6] v) => (float[T,6] y) {{ y = {gemm} }}", **GIVEN)


@pytest.mark.parametrize(
    ("gemm", "left"),
    [
        ("Gemm(x, w, b)", {"MatMul": 1, "Add": 1}),
        ("Gemm<transB=1>(x, wt, b)", {"Transpose": 1, "MatMul": 1, "Add": 1}),
        ("Gemm(x, w, b2)", {"MatMul": 1, "Add": 1}),
        ("Gemm<transB=1>(x, wt)", {"Transpose": 1, "MatMul": 1}),
    ],
)
def test_a_linear_layer_is_a_product_and_a_sum(gemm: str, left: dict[str, int]) -> None:
    before = graph(gemm)
    after, report = apply(UnfoldGemm, before)
    assert report.rewrites == 1 and ops(after) == left
    feeds = {"x": rows(3, 8), "v": rows(8, 6)}
    same(before, after, feeds)
    layer = linear(next(n for n in after.surgeon.nodes if n.op == "MatMul"))
    assert layer is not None and (layer.width, layer.depth) == (6, 8) and layer.transposed == ("transB" in gemm)
    assert layer.weight.name == ("wt" if "transB" in gemm else "w"), "the weight as it is stored"
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, apply(UnfoldGemm, graph("Gemm(x, w, s)"))[0], feeds)


@pytest.mark.parametrize(
    ("gemm", "reason"),
    [
        ("Gemm(x, v, b)", "its second operand is no constant matrix"),
        ("Gemm<alpha=0.5>(x, w, b)", "it scales or transposes"),
        ("Gemm<beta=0.5>(x, w, b)", "it scales or transposes"),
        ("Gemm(x, w, c)", "its third operand is no constant of shape [6]"),
        ("Gemm(x, w, s)", "its third operand is no constant of shape [6]"),
    ],
)
def test_anything_else_is_refused(gemm: str, reason: str) -> None:
    assert refused(UnfoldGemm, graph(gemm)) == reason
