from __future__ import annotations

import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph

from llmlab.graph.passes.simplify import MergeReshapes


def twice(first: list[int], second: list[int], out: str):
    return small_graph(
        f"""m (float[N,2,6] x) => (float[{out}] y) {{
            a = Constant<value_ints={first}>()
            b = Constant<value_ints={second}>()
            h = Reshape(x, a)
            y = Reshape(h, b)
        }}"""
    )


@pytest.mark.parametrize(
    ("first", "second", "out"), [([0, 12], [0, 3, 4], "N,3,4"), ([0, 4, 3], [-1, 12], "N,12"), ([-1, 2, 3], [-1], "M")]
)
def test_two_become_one(first: list[int], second: list[int], out: str) -> None:
    before = twice(first, second, out)
    after, report = apply(MergeReshapes, before)
    assert report.rewrites == 1 and ops(after) == {"Reshape": 1}
    same(before, after, {"x": rows(5, 2, 6)})


def test_a_size_copied_from_between_is_refused() -> None:
    before = twice([0, 3, 4], [0, 0, 2, 2], "N,3,2,2")
    assert refused(MergeReshapes, before) == "size 1 is copied from a shape that the first Reshape changes"


def test_computed_sizes_are_refused() -> None:
    graph = small_graph(
        """m (float[N,2,6] x, int64[2] s) => (float[A,B] y) {
            a = Constant<value_ints=[0, 12]>()
            h = Reshape(x, a)
            y = Reshape(h, s)
        }"""
    )
    assert refused(MergeReshapes, graph) == "its sizes are computed"
