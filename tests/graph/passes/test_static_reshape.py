from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, refused, rows, same, small_graph

from llmlab.graph.edit import ints
from llmlab.graph.passes.simplify import StaticReshape, static_target

COMPUTED = """m (float[B,S,8] x) => (float[B,S,2,4] y) {
    b = Shape<start=0, end=2>(x)
    rest = Constant<value_ints=[2, 4]>()
    sizes = Concat<axis=0>(b, rest)
    y = Reshape(x, sizes)
}"""


def test_computed_sizes_become_constants() -> None:
    before = small_graph(COMPUTED)
    after, report = apply(StaticReshape, before)
    assert report.rewrites == 1
    (reshape,) = after.surgeon.nodes
    assert ints(reshape.inputs[1]) == [0, 0, 2, 4]
    for sizes in ((1, 1), (2, 5)):
        same(before, after, {"x": rows(*sizes, 8)})


def test_two_unknown_sizes_are_refused() -> None:
    graph = small_graph("m (float[N] x, int64[2] s) => (float[A,B] y) { y = Reshape(x, s) }")
    assert "more than one size that changes and isn't known" in refused(StaticReshape, graph)


def test_an_unknown_rank_is_refused() -> None:
    graph = small_graph("m (float[N] x, int64[R] s) => (float y) { y0 = Reshape(x, s) y = ReduceSum<keepdims=0>(y0) }")
    assert refused(StaticReshape, graph) == "the shape of its input or output isn't known"


@pytest.mark.parametrize(
    ("source", "out", "target"),
    [
        (["B", "S", 8], ["B", "S", 2, 4], [0, 0, 2, 4]),
        (["B", "S", 8], ["BS", 8], [-1, 8]),
        (["B", "S", 2, 4], ["B", "S", 8], [0, 0, 8]),
        (["B", 2, "S", 4], ["B2", "S", 4], None),
        (["B", "S"], ["S", "B"], None),
        ([2, "S"], ["S", 2], [-1, 2]),
    ],
)
def test_static_target(source: list, out: list, target: list | None) -> None:
    assert static_target(source, out) == target
    if target is not None:
        sizes = {"B": 3, "S": 5, "BS": 15, "B2": 6}
        concrete = [sizes.get(d, d) for d in source]
        wanted = [concrete[i] if t == 0 else t for i, t in enumerate(target)]
        assert list(np.zeros(concrete).reshape(wanted).shape) == [sizes.get(d, d) for d in out]
