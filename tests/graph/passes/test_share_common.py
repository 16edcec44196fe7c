from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph

from llmlab.graph.passes.share_common import ShareCommon


def test_the_same_computation_is_done_once() -> None:
    """A whole chain is shared, also where each copy brings its own equal constant."""
    before = small_graph(
        """m (float[N] x) => (float[N] y) {
            a = Add(x, c1)
            b = Add(x, c2)
            d = Exp(a)
            e = Exp(b)
            y = Mul(d, e)
        }""",
        c1=np.array([2.0], np.float32),
        c2=np.array([2.0], np.float32),
    )
    after, report = apply(ShareCommon, before)
    assert report.rewrites == 2 and ops(after) == {"Add": 1, "Exp": 1, "Mul": 1}
    same(before, after, {"x": rows(4)})


@pytest.mark.parametrize(
    "lines",
    [
        "a = Add(x, c1) b = Add(x, c2)",
        "a = Sub(x, c1) b = Sub(c1, x)",
        "a = LeakyRelu<alpha=0.1>(x) b = LeakyRelu<alpha=0.2>(x)",
        "a = Exp(x) b = Sqrt(x)",
        "a = RandomUniformLike<seed=1.0>(x) b = RandomUniformLike<seed=1.0>(x)",
    ],
)
def test_different_computations_stay_apart(lines: str) -> None:
    before = small_graph(
        f"m (float[N] x) => (float[N] y) {{ {lines} y = Mul(a, b) }}",
        c1=np.array([2.0], np.float32),
        c2=np.array([3.0], np.float32),
    )
    after, report = apply(ShareCommon, before)
    assert report.matches == 0 and ops(after) == ops(before)


def test_an_output_keeps_its_node() -> None:
    before = small_graph("m (float[N] x) => (float[N] y, float[N] z) { y = Exp(x) z = Exp(x) }")
    assert refused(ShareCommon, before) == "it is an output of the graph"
