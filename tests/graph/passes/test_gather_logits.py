from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, run, small_graph

from llmlab.graph.passes.gather_logits import GatherLogits

# What follows the last attention: `kept` is mixed over tokens, everything after it is row by row.
TAIL = """m (float[T,8] x) => (float[{}] logits) {{
    i0 = Constant<value_int=0>()
    kept = CumSum(x, i0)
    {}
}}"""
ABOVE = {
    "head": ("T,6", "logits = MatMul(kept, w)"),
    "norm and head": ("T,6", "n = RMSNormalization<axis=-1>(kept, c8) logits = MatMul(n, w)"),
    "residual": ("T,8", "a = Exp(kept) b = Neg(a) logits = Add(kept, b)"),
    "second source": ("T,8", "i1 = Constant<value_int=0>() other = CumSum<reverse=1>(x, i1) logits = Mul(kept, other)"),
    "nothing to rise above": ("T,8", "logits = CumSum(kept, i0)"),
    "softcap": ("T,6", "s = MatMul(kept, w) d = Div(s, c1) t = Tanh(d) logits = Mul(t, c1)"),
}
MORE = {"w": rows(8, 6), "c8": rows(8), "c1": np.array([3], np.float32)}


@pytest.mark.parametrize(("shape", "line"), ABOVE.values(), ids=ABOVE)
@pytest.mark.parametrize("wanted", [[4], [3, 0, 0, 2], []])
def test_wanted_rows_alone_go_through_the_end(shape: str, line: str, wanted: list[int]) -> None:
    before = small_graph(TAIL.format(shape, line), **MORE)
    after, report = apply(GatherLogits, before)
    assert report.rewrites == 1
    assert [t.name for t in after.surgeon.inputs][-1] == "logits_index"
    for node in after.surgeon.nodes:
        assert node.op != "Gather" or node.inputs[0].inputs[0].op == "CumSum", "it rose to what mixes tokens"
    x, index = rows(5, 8), np.array(wanted, np.int64)
    (expected,) = run(before, {"x": x})
    (found,) = run(after, {"x": x, "logits_index": index})
    np.testing.assert_allclose(found, expected[index], rtol=1e-5, atol=1e-5)


def test_it_does_not_rise_past_a_second_reader() -> None:
    """What mixed rows still read has to keep all its rows."""
    line = "a = Exp(kept) i1 = Constant<value_int=0>() s = CumSum(a, i1) logits = Add(a, s)"
    before = small_graph(TAIL.format("T,8", line), **MORE)
    after, _ = apply(GatherLogits, before)
    assert ops(after)["Exp"] == 1
    x, index = rows(5, 8), np.array([4, 1])
    np.testing.assert_allclose(
        run(after, {"x": x, "logits_index": index})[0], run(before, {"x": x})[0][index], rtol=1e-5, atol=1e-5
    )


def test_logits_of_another_shape_are_refused() -> None:
    graph = small_graph("m (float[8,T] x) => (float[8,T] logits) { logits = Neg(x) }")
    assert refused(GatherLogits, graph) == "the logits have shape [8, 'T'], expected [T, vocab]"


def test_a_second_time_it_finds_nothing() -> None:
    after, _ = apply(GatherLogits, small_graph(TAIL.format("T,6", "logits = MatMul(kept, w)"), **MORE))
    _, report = apply(GatherLogits, after)
    assert report.matches == 0
