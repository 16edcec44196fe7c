"""Positions and row numbers as int32 compute what they did as int64."""

from __future__ import annotations

import numpy as np
from small_graphs import ops, rows, run, small_graph

from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.lower.int32 import int32_inputs

TABLE = {"w": rows(40, 4)}
POSITIONS = np.array([3, 0, 7, 7, 12])


def narrowed(graph: Graph) -> Graph:
    result = graph.copy()
    int32_inputs(Editor(result))
    result.surgeon.cleanup().toposort()
    return result


def check(body: str, casts: int, given: str = "float y", **more: np.ndarray) -> Graph:
    graph = small_graph(f"m (int64[T] p) => ({given}) {{ {body} }}", **TABLE, **more)
    after = narrowed(graph)
    assert after.surgeon.inputs[0].dtype == np.int32 and graph.surgeon.inputs[0].dtype == np.int64
    assert ops(after).get("Cast", 0) == casts
    (found,) = run(after, {"p": POSITIONS.astype(np.int32)})
    (expected,) = run(graph, {"p": POSITIONS})
    np.testing.assert_array_equal(found, expected)
    return after


def test_a_gather_reads_them_as_they_are() -> None:
    check("y = Gather(w, p)", 0)


def test_arithmetic_on_them_has_no_cast() -> None:
    """OPT's offset; a bound; a choice."""
    body = """two = Constant<value_int=2>() most = Constant<value_int=9>()
        a = Add(p, two) b = Min(a, most) c = Less(p, most) d = Where(c, b, two) y = Gather(w, d)"""
    after = check(body, 0)
    assert {t.dtype for n in after.surgeon.nodes if n.op in ("Add", "Min", "Where") for t in n.outputs} == {
        np.dtype(np.int32)
    }


def test_shapes_stay_int64() -> None:
    body = "s = Shape(p) one = Constant<value_ints=[1]>() t = Concat<axis=0>(s, one) q = Reshape(p, t) y = Gather(w, q)"
    check(body, 0)


def test_an_operator_that_wants_int64_reads_a_cast() -> None:
    check("last = Constant<value_ints=[-1]>() q = Unsqueeze(p, last) y = GatherND(w, q)", 1)


def test_what_does_not_fit_stays_int64() -> None:
    check("big = Constant<value_int=8589934592>() a = Add(p, big) f = Cast<to=1>(a) y = Neg(f)", 2)


def test_a_cast_to_float_reads_them_as_they_are() -> None:
    check("f = Cast<to=1>(p) y = Neg(f)", 1)
