from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, rows, same, small_graph, weights

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
