from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, rows, run, same, small_graph, weights

from llmlab.graph.passes.fold_constants import FoldConstants


def test_constants_in_all_spellings_are_computed() -> None:
    graph = small_graph(
        """m (float[N] x) => (float[N] y) {
            i = Constant<value_int=3>()
            f = Cast<to=1>(i)
            g = Constant<value_float=2.0>()
            h = Constant<value=float {0.5}>()
            a = Mul(f, g)
            b = Add(a, h)
            y = Mul(x, b)
        }""",
        fold=False,
    )
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and ops(after) == {"Mul": 1}
    same(graph, after, {"x": rows(5)})


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_stay_where_they_are(dtype: type) -> None:
    w = weights(w=(4, 8))["w"].astype(dtype)
    graph = small_graph(
        """m (float[N,8] x) => (float[N,4] y) {
            wide = Cast<to=1>(w)
            turned = Transpose<perm=[1,0]>(wide)
            y = MatMul(x, turned)
        }""",
        fold=False,
        w=w,
    )
    after, report = apply(FoldConstants, graph)
    assert report.matches == 0 and ops(after) == ops(graph)
    same(graph, after, {"x": rows(3, 8)})


def test_what_depends_on_an_input_stays() -> None:
    graph = small_graph("m (float[N] x) => (int64[1] y) { y = Shape(x) }", fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.matches == 0 and ops(after) == {"Shape": 1}


@pytest.mark.parametrize(
    ("size", "known"), [("Shape<start=-1>(x)", [8]), ("Shape<start=1>(x)", [4, 8]), ("Shape<start=1,end=2>(x)", [4])]
)
def test_sizes_that_are_known_are_constants(size: str, known: list[int]) -> None:
    graph = small_graph(f"m (float[N,4,8] x) => (int64[k] y) {{ a = {size} y = Identity(a) }}", fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and "Shape" not in ops(after)
    same(graph, after, {"x": rows(3, 4, 8)})
    assert run(graph, {"x": rows(3, 4, 8)})[0].tolist() == known


@pytest.mark.parametrize("size", ["Shape(x)", "Shape<end=1>(x)", "Shape<start=0,end=2>(x)"])
def test_sizes_that_tokens_bring_stay(size: str) -> None:
    graph = small_graph(f"m (float[N,4,8] x) => (int64[k] y) {{ y = {size} }}", fold=False)
    _, report = apply(FoldConstants, graph)
    assert report.matches == 0


def test_olmo_norms_without_weights_get_theirs() -> None:
    """F.layer_norm without weights is traced as ones expanded to the size of the last axis."""
    graph = small_graph(
        """m (float[N,8] x) => (float[N,8] y) {
            one = Constant<value=float {1.0}>()
            size = Shape<start=-1>(x)
            w = Expand(one, size)
            y = LayerNormalization<axis=-1>(x, w)
        }""",
        fold=False,
    )
    after, _ = apply(FoldConstants, graph)
    assert ops(after) == {"LayerNormalization": 1}
    same(graph, after, {"x": rows(3, 8)})


def test_large_results_are_not_written_out() -> None:
    graph = small_graph(
        """m (float[N,8] x) => (float[N,400,400] y) {
            one = Constant<value=float {1.0}>()
            size = Constant<value_ints=[1, 400, 400]>()
            w = Expand(one, size)
            s = Gather<axis=1>(x, i)
            y = Add(w, s)
        }""",
        fold=False,
        i=np.zeros((1, 1), np.int64),
    )
    after, _ = apply(FoldConstants, graph)
    assert ops(after)["Expand"] == 1, "640 kB that Expand makes of four bytes"
    same(graph, after, {"x": rows(3, 8)})


IF = """m (float[N] x) => (float[N] y) {
    yes = Constant<value=bool {FLAG}>()
    y = If (yes) <
        then_branch = t () => (float[N] a) { a = Neg(x) },
        else_branch = e () => (float[N] b) { b = Exp(x) }
    >
}"""


@pytest.mark.parametrize(("flag", "left"), [("1", {"Neg": 1}), ("0", {"Exp": 1})])
def test_an_if_that_is_decided_is_one_branch(flag: str, left: dict[str, int]) -> None:
    graph = small_graph(IF.replace("FLAG", flag), fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and ops(after) == left
    same(graph, after, {"x": rows(5)})


def test_an_if_that_depends_on_the_input_stays() -> None:
    text = IF.replace("float[N] x)", "float[N] x, bool flag)").replace(
        "yes = Constant<value=bool {FLAG}>()", "yes = Not(flag)"
    )
    graph = small_graph(text, fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.matches == 0 and ops(after) == {"Not": 1, "If": 1}


def test_nodes_that_nobody_reads_are_gone() -> None:
    graph = small_graph(
        """m (float[N] x) => (float[N] y) {
            two = Constant<value_float=2.0>()
            dead = Exp(x)
            deader = Neg(dead)
            y = Mul(x, two)
        }""",
        fold=False,
    )
    after, report = apply(FoldConstants, graph)
    assert ops(after) == {"Mul": 1} and report.nodes_before == 4
    same(graph, after, {"x": rows(5)})
