"""Linear layers as ONNX Runtime gets them: one Gemm each, on the weight as it is stored."""

from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, rows, run, same, small_graph, weights

from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.lower.onnxruntime_nbits import lower_weight_only
from llmlab.graph.lower.onnxruntime_products import lower_products, split_products
from llmlab.graph.lower.onnxruntime_quantized import join_quantized
from llmlab.graph.passes.merge_products import MergeProducts

GIVEN = weights(wt=(6, 8), w=(8, 6), vt=(6, 8), v=(8, 6), b=(6,), c=(6,))


def lowered(graph: Graph) -> Graph:
    result = graph.copy()
    edit = Editor(result)
    split_products(edit, set())
    lower_products(edit)
    result.surgeon.cleanup().toposort()
    return result


def gemms(graph: Graph) -> list[tuple[list[str], int]]:
    return [([t.name for t in n.inputs[1:]], n.attrs["transB"]) for n in graph.surgeon.nodes if n.op == "Gemm"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("t = Transpose<perm=[1,0]>(wt) y = MatMul(x, t)", (["wt"], 1)),
        ("t = Transpose<perm=[1,0]>(wt) p = MatMul(x, t) y = Add(b, p)", (["wt", "b"], 1)),
        ("y = MatMul(x, w)", (["w"], 0)),
        ("p = MatMul(x, w) y = Add(p, b)", (["w", "b"], 0)),
        ("p = MatMul(x, w) y = Add(p, r)", (["w", "r"], 0)),
    ],
)
def test_a_layer_is_one_gemm(layer: str, expected: tuple[list[str], int]) -> None:
    before = small_graph(f"m (float[T,8] x, float[T,6] r) => (float[T,6] y) {{ {layer} }}", **GIVEN)
    after = lowered(before)
    assert ops(after) == {"Gemm": 1} and gemms(after) == [expected]
    feeds = {"x": rows(5, 8), "r": rows(5, 6)}
    same(before, after, feeds)
    after.surgeon.nodes[0].inputs[1].values = after.surgeon.nodes[0].inputs[1].values + np.float32(0.01)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, after, feeds)


def test_a_sum_that_broadcasts_stays_outside() -> None:
    before = small_graph("m (float[T,8] x, float[1,6] r) => (float[T,6] y) { p = MatMul(x, w) y = Add(p, r) }", **GIVEN)
    after = lowered(before)
    assert ops(after) == {"Gemm": 1, "Add": 1}
    same(before, after, {"x": rows(5, 8), "r": rows(1, 6)})


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_products_come_apart_again(transposed: bool, bias: bool) -> None:
    first, second = (("Transpose<perm=[1,0]>(wt)", "Transpose<perm=[1,0]>(vt)") if transposed else ("Identity(w)", "Identity(v)"))  # fmt: skip
    sums = "a1 = Add(a0, b) b1 = Add(c, b0)" if bias else "a1 = Neg(a0) b1 = Exp(b0)"
    text = f"m (float[T,8] x) => (float[T,6] y) {{ ta = {first} tb = {second} a0 = MatMul(x, ta) b0 = MatMul(x, tb) {sums} y = Mul(a1, b1) }}"
    before = small_graph(text, **GIVEN)
    for node in before.surgeon.nodes:
        node.name = node.name.replace("m.", "layer.")
    merged, report = apply(MergeProducts, before)
    assert report.rewrites == 1
    after = lowered(merged)
    assert ops(after)["Gemm"] == 2 and not {"Split", "Concat", "MatMul"} & set(ops(after))
    same(before, after, {"x": rows(5, 8)})


def test_products_that_share_more_than_a_split_stay_merged() -> None:
    text = """m (float[T,8] x) => (float[T,6] y, float[T,12] p) {
        p = MatMul(x, whole)
        sizes = Constant<value_ints=[6, 6]>()
        a, b = Split<axis=-1>(p, sizes)
        y = Mul(a, b)
    }"""
    before = small_graph(text, whole=rows(8, 12))
    after = lowered(before)
    assert ops(after) == {"Gemm": 1, "Split": 1, "Mul": 1}
    same(before, after, {"x": rows(5, 8)})


def test_merged_products_with_quantized_weights_stay_merged() -> None:
    text = """m (float[T,8] x) => (float[T,6] y) {
        wa = DequantizeLinear<axis=0>(qa, sa)
        wb = DequantizeLinear<axis=0>(qb, sb)
        both = Concat<axis=0>(wa, wb)
        turned = Transpose<perm=[1,0]>(both)
        p = MatMul(x, turned)
        a, b = Split<axis=-1>(p, sizes)
        y = Mul(a, b)
    }"""
    values = np.random.default_rng(0).integers(-127, 128, (2, 6, 8)).astype(np.int8)
    given = {"qa": values[0], "qb": values[1], "sa": rows(6) ** 2 + 0.1, "sb": rows(6) ** 2 + 0.2}
    before = small_graph(text, fold=False, sizes=np.array([6, 6]), **given)
    edit = Editor(before.copy())
    split_products(edit, set())
    join_quantized(edit)
    lower_weight_only(edit, 4)
    sort_nodes(edit.surgeon.cleanup())
    assert ops(edit.graph) == {"MatMulNBits": 1, "Split": 1, "Mul": 1}
    found, expected = (run(g, {"x": rows(5, 8)})[0] for g in (edit.graph, before))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
