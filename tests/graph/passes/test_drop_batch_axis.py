from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, attention_graph, ops, rows, same, small_graph

from llmlab.graph.optimize import optimize
from llmlab.graph.passes.drop_batch_axis import DropBatchAxis
from llmlab.graph.passes.pack_tokens import PackTokens
from llmlab.graph.passes.page_attention import PageAttention

FRAME = """m (float[T,8] x0) => (float[{}] y) {{
    batch = Constant<value_ints=[0]>()
    x = Unsqueeze(x0, batch)
    {}
    y = Squeeze(y1, batch)
}}"""
W = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
SINKS = {
    "elementwise": ("T,8", "y1 = Add(x, c8)"),
    "two lifted": ("T,8", "z = Exp(x) y1 = Mul(x, z)"),
    "constant with a batch axis": ("T,8", "y1 = Mul(x, c118)"),
    "product": ("T,6", "y1 = MatMul(x, w)"),
    "softmax": ("T,8", "y1 = Softmax<axis=-1>(x)"),
    "softmax over tokens": ("T,8", "y1 = Softmax<axis=1>(x)"),
    "split": ("T,4", "n = Constant<value_ints=[4, 4]>() a, b = Split<axis=2>(x, n) y1 = Sub(a, b)"),
    "concat": ("T,16", "z = Neg(x) y1 = Concat<axis=2>(x, z)"),
    "mean": ("T,1", "k = Constant<value_ints=[2]>() y1 = ReduceMean<keepdims=1>(x, k)"),
    "slice": (
        "T,3",
        "s = Constant<value_ints=[2]>() e = Constant<value_ints=[5]>() k = Constant<value_ints=[-1]>() y1 = Slice(x, s, e, k)",
    ),
    "heads": ("2,T,4", "n = Constant<value_ints=[0, 0, 2, 4]>() h = Reshape(x, n) y1 = Transpose<perm=[0,2,1,3]>(h)"),
    "reshape to one": ("T,4,2", "n = Constant<value_ints=[1, -1, 4, 2]>() y1 = Reshape(x, n)"),
    "norm": ("T,8", "y1 = RMSNormalization<axis=-1>(x, c8)"),
}
MORE = {"c8": rows(8), "c118": rows(1, 1, 8), "w": W}


@pytest.mark.parametrize(("shape", "line"), SINKS.values(), ids=SINKS)
def test_the_axis_sinks_to_the_end(shape: str, line: str) -> None:
    before = small_graph(FRAME.format(shape, line), **MORE)
    after, report = apply(DropBatchAxis, before)
    assert not report.near_misses and "Unsqueeze" not in ops(after) and "Squeeze" not in ops(after)
    for tokens in (1, 5):
        same(before, after, {"x0": rows(tokens, 8)})


STAYS = {
    "sum over the batch": (
        "T,8",
        "k = Constant<value_ints=[0]>() y1 = ReduceSum<keepdims=1>(x, k)",
        "its axes are computed or include the batch's",
    ),
    "softmax over the batch": ("T,8", "y1 = Softmax<axis=0>(x)", "it works along the batch axis"),
    "transposed batch": (
        "T,8",
        "a = Transpose<perm=[1,0,2]>(x) b = Transpose<perm=[1,0,2]>(a) y1 = Neg(b)",
        "its output has shape ['T', 1, 8]",
    ),
    "merged batch": (
        "T,8",
        "n = Constant<value_ints=[-1, 8]>() f = Reshape(x, n) y1 = Unsqueeze(f, batch)",
        "its output has shape",
    ),
    "outer product": (
        "8,8",
        "t = Transpose<perm=[0,2,1]>(x) y1 = MatMul(t, x)",
        "it is not a product with a constant matrix",
    ),
    "unknown operator": ("T,8", "k = Constant<value_int=1>() y1 = CumSum(x, k)", "CumSum is not known to allow it"),
    "sum that drops an axis": (
        "T",
        "k = Constant<value_ints=[2]>() y1 = ReduceSum<keepdims=0>(x, k)",
        "it does not keep the reduced axis",
    ),
    "stranger with a batch axis": (
        "T,8",
        "y2 = Neg(x) y3 = CumSum(y2, i1) y1 = Add(x, y3)",
        "CumSum is not known to allow it",
    ),
}


@pytest.mark.parametrize(("shape", "line", "reason"), STAYS.values(), ids=STAYS)
def test_what_is_not_known_keeps_its_axis_and_runs_right(shape: str, line: str, reason: str) -> None:
    before = small_graph(FRAME.format(shape, line), **MORE, i1=np.array(1))
    after, report = apply(DropBatchAxis, before)
    assert any(reason in miss.reason for miss in report.near_misses)
    same(before, after, {"x0": rows(5, 8)})


def test_nothing_is_left_of_it_in_a_whole_model() -> None:
    after = optimize(attention_graph(), passes=[PackTokens, PageAttention, DropBatchAxis])
    assert not {"Unsqueeze", "Squeeze"} & set(ops(after)) and not after.history[-1].near_misses
