"""What keeps tokens apart, and what is refused because it may not."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import rows, small_graph

from llmlab.graph.rows import mixing_node

FRAME = "m (float[{}] x, int64[T] ids) => (float y) {{ {} }}"
MORE = {
    "w": rows(8, 6),
    "c8": rows(8),
    "k1": np.array([1]),
    "c1": np.array([1], np.float32),
    "i0": np.array(0),
    "table": rows(12, 8),
}

APART = {
    "elementwise": ("T,8", "y = Add(x, c8)"),
    "product": ("T,8", "y = MatMul(x, w)"),
    "norm": ("T,8", "y = RMSNormalization<axis=-1>(x, c8)"),
    "layer norm": ("T,8", "y = LayerNormalization<axis=-1>(x, c8)"),
    "softmax": ("T,8", "y = Softmax<axis=-1>(x)"),
    "mean": ("T,8", "k = Constant<value_ints=[-1]>() y = ReduceMean(x, k)"),
    "concat": ("T,8", "z = Neg(x) y = Concat<axis=1>(x, z)"),
    "split": ("T,8", "n = Constant<value_ints=[4, 4]>() y, z = Split<axis=1>(x, n)"),
    "heads": ("T,8", "n = Constant<value_ints=[0, 2, 4]>() h = Reshape(x, n) y = Transpose<perm=[1, 0, 2]>(h)"),
    "look up": ("T,8", "y = Gather(table, ids)"),
    "slice": (
        "T,8",
        "s = Constant<value_ints=[1]>() e = Constant<value_ints=[3]>() k = Constant<value_ints=[1]>() y = Slice(x, s, e, k)",
    ),
    "batch of one": ("1,T,8", "y = Mul(x, c1)"),
}
MIXED = {
    "cumsum over tokens": ("T,8", "y = CumSum(x, i0)", "CumSum is not known to keep tokens apart"),
    "softmax over tokens": ("T,8", "y = Softmax<axis=0>(x)", "it works along the token axis"),
    "mean over tokens": ("T,8", "k = Constant<value_ints=[0]>() y = ReduceMean(x, k)", "its output has no token axis"),
    "mean over everything": ("T,8", "y = ReduceMean(x)", "its output has no token axis"),
    "scores": ("T,8", "t = Transpose<perm=[1, 0]>(x) y = MatMul(x, t)", "it multiplies tokens with each other"),
    "scores by head": (
        "2,T,4",
        "t = Transpose<perm=[0, 2, 1]>(x) y = MatMul(x, t)",
        "it multiplies tokens with each other",
    ),
    "gram": ("T,8", "t = Transpose<perm=[1, 0]>(x) y = MatMul(t, x)", "its output has no token axis"),
    "tokens turned away": (
        "T,T",
        "t = Identity(x) u = ReduceMax<keepdims=1>(x, k1) v = Transpose<perm=[1, 0]>(u) y = Add(u, v)",
        "its inputs count tokens along different axes",
    ),
    "norm over tokens": ("8,T", "y = RMSNormalization<axis=0>(x, c8)", "it works along the token axis"),
    "layer norm over tokens": ("4,8,T", "y = LayerNormalization<axis=1>(x, c8)", "it works along the token axis"),
    "sum joined": (
        "T,8",
        "k = Constant<value_ints=[0]>() m = ReduceMax<keepdims=1>(x, k) y = Sub(x, m)",
        "its output has no token axis",
    ),
    "shift": (
        "T,8",
        "s = Constant<value_ints=[1]>() e = Constant<value_ints=[99]>() k = Constant<value_ints=[0]>() y = Slice(x, s, e, k)",
        "its output has no token axis",
    ),
    "pick": ("T,8", "y = Gather<axis=0>(x, ids)", "it picks among tokens"),
    "number of tokens": ("T,8", "s = Shape(x) y = Cast<to=1>(s)", "its output has no token axis"),
    "merged": ("2,T,4", "n = Constant<value_ints=[-1, 4]>() y = Reshape(x, n)", "its output has no token axis"),
    "unknown shape": ("T,8", "y = Reshape(x, ids)", "the shape of y is not known"),
}


@pytest.mark.parametrize(("shape", "line"), APART.values(), ids=APART)
def test_what_keeps_tokens_apart_passes(shape: str, line: str) -> None:
    assert mixing_node(small_graph(FRAME.format(shape, line), **MORE)) is None


@pytest.mark.parametrize(("shape", "line", "reason"), MIXED.values(), ids=MIXED)
def test_what_may_mix_tokens_is_named(shape: str, line: str, reason: str) -> None:
    found = small_graph(FRAME.format(shape, line), **MORE)
    result = mixing_node(found)
    assert result is not None and result[1] == reason and isinstance(result[0], gs.Node)
