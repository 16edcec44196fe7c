from __future__ import annotations

import pytest
from small_graphs import apply, ops, rows, same, small_graph

from llmlab.graph.passes.simplify import RemoveNoOps

NO_OPS = {
    "identity": "y0 = Identity(x)",
    "cast": "y0 = Cast<to=1>(x)",
    "slice": "s = Constant<value_ints=[0, 0]>() e = Constant<value_ints=[9223372036854775807, 9223372036854775807]>() y0 = Slice(x, s, e)",
    "reshape": "s = Constant<value_ints=[0, 0, 6]>() y0 = Reshape(x, s)",
    "transpose": "y0 = Transpose<perm=[0, 1, 2]>(x)",
    "two transposes": "t = Transpose<perm=[1, 2, 0]>(x) y0 = Transpose<perm=[2, 0, 1]>(t)",
    "squeeze": "a = Constant<value_ints=[0]>() u = Unsqueeze(x, a) y0 = Squeeze(u, a)",
}
NOT = {
    "cast": "i = Cast<to=7>(x) y0 = Cast<to=1>(i)",
    "slice": "s = Constant<value_ints=[1]>() e = Constant<value_ints=[9223372036854775807]>() y0 = Slice(x, s, e)",
    "reversed slice": "s = Constant<value_ints=[0]>() e = Constant<value_ints=[9223372036854775807]>() a = Constant<value_ints=[0]>() d = Constant<value_ints=[2]>() y0 = Slice(x, s, e, a, d)",
    "reshape": "s = Constant<value_ints=[0, 3, 4]>() y0 = Reshape(x, s)",
    "two transposes": "t = Transpose<perm=[1, 2, 0]>(x) y0 = Transpose<perm=[1, 2, 0]>(t)",
    "squeeze": "a = Constant<value_ints=[0]>() b = Constant<value_ints=[1]>() k = Constant<value_ints=[1]>() m = ReduceMax(x, k) u = Unsqueeze(m, a) t = Transpose<perm=[1,2,0,3]>(u) y0 = Squeeze(t, b)",
}


def graph(line: str, x: str = "float[N,2,6]", y: str = "float[N,2,6]"):
    return small_graph(f"m ({x} x) => ({y} y) {{ {line} y = Neg(y0) }}")


@pytest.mark.parametrize("line", NO_OPS.values(), ids=NO_OPS)
def test_what_changes_nothing_goes(line: str) -> None:
    before = graph(line)
    after, report = apply(RemoveNoOps, before)
    assert report.rewrites == 1 and ops(after) == {"Neg": 1}
    same(before, after, {"x": rows(3, 2, 6)})


@pytest.mark.parametrize("line", NOT.values(), ids=NOT)
def test_what_changes_something_stays(line: str) -> None:
    before = graph(line, y="float[a,b,c]")
    after, report = apply(RemoveNoOps, before)
    assert report.rewrites == 0 and ops(after) == ops(before)


def test_an_input_does_not_become_an_output() -> None:
    before = small_graph("m (float[N] x) => (float[N] y) { y = Identity(x) }")
    after, _ = apply(RemoveNoOps, before)
    assert ops(after) == {"Identity": 1}
    same(before, after, {"x": rows(3)})


def test_unknown_sizes_are_not_taken_for_equal() -> None:
    """Expand to a computed shape may widen: only declared, equal shapes are a proof."""
    before = small_graph("m (float[N] x, int64[1] s) => (float[M] y) { y0 = Expand(x, s) y = Neg(y0) }")
    after, report = apply(RemoveNoOps, before)
    assert report.rewrites == 0 and ops(after) == {"Expand": 1, "Neg": 1}
