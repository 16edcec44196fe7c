"""What keeps tokens apart, and what is refused because it may not."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from small_graphs import rows, run, small_graph

from llmlab.graph.analysis.rows import mixing_node, token_axis
from llmlab.graph.graph import Graph

FRAME = "m (float[{}] x, int64[T] ids) => (float y) {{ {} }}"
MORE = {
    "w": rows(8, 6),
    "c8": rows(8),
    "k1": np.array([1]),
    "c1": np.array([1], np.float32),
    "i0": np.array(0),
    "i2": np.array(2),
    "table": rows(12, 8),
    "w24": rows(6, 2, 4),
    "c58": rows(5, 8),
    "c8T": rows(1),
    "conv": rows(8, 8, 3),
    "p8": np.abs(rows(8)) + 0.1,
    "z8": np.zeros(8, np.uint8),
}

APART = {
    "elementwise": ("T,8", "y = Add(x, c8)"),
    "product": ("T,8", "y = MatMul(x, w)"),
    "product from the left": ("8,T", "u = Transpose<perm=[1, 0]>(w) y = MatMul(u, x)"),
    "product of a token's own": ("T,2,4", "u = Transpose<perm=[0, 2, 1]>(x) y = MatMul(x, u)"),
    "product with a vector": ("T,8", "y = MatMul(x, c8)"),
    "gemm": ("T,8", "y = Gemm(x, w)"),
    "gemm, turned": ("8,T", "y = Gemm<transA=1>(x, w)"),
    "gemm from the left": ("8,T", "u = Transpose<perm=[1, 0]>(w) y = Gemm(u, x)"),
    "einsum": ("T,2,4", 'y = Einsum<equation="thd,ehd->te">(x, w24)'),
    "einsum of a token's own": ("T,2,4", 'y = Einsum<equation="tid,tjd->ijt">(x, x)'),
    "norm": ("T,8", "y = RMSNormalization<axis=-1>(x, c8)"),
    "layer norm": ("T,8", "y = LayerNormalization<axis=-1>(x, c8, c8)"),
    "softmax": ("T,8", "y = Softmax<axis=-1>(x)"),
    "gelu": ("T,8", "u = Gelu(x) y = Erf(u)"),
    "mean": ("T,8", "k = Constant<value_ints=[-1]>() y = ReduceMean(x, k)"),
    "sum that drops an axis": ("2,T,4", "k = Constant<value_ints=[0]>() y = ReduceSum<keepdims=0>(x, k)"),
    "argmax": ("2,T,4", "u = ArgMax<axis=0, keepdims=0>(x) y = Cast<to=1>(u)"),
    "top k": ("T,8", "k = Constant<value_ints=[3]>() y, j = TopK(x, k)"),
    "cumsum along the width": ("T,8", "k = Constant<value_int=1>() y = CumSum(x, k)"),
    "one hot": ("T,8", "d = Constant<value_int=12>() v = Constant<value_floats=[0.0, 1.0]>() y = OneHot(ids, d, v)"),
    "one hot in front": (
        "T,8",
        "d = Constant<value_int=12>() v = Constant<value_floats=[0.0, 1.0]>() y = OneHot<axis=0>(ids, d, v)",
    ),
    "concat": ("T,8", "z = Neg(x) y = Concat<axis=1>(x, z)"),
    "split": ("T,8", "n = Constant<value_ints=[4, 4]>() y, z = Split<axis=1>(x, n)"),
    "heads": ("T,8", "n = Constant<value_ints=[0, 2, 4]>() h = Reshape(x, n) y = Transpose<perm=[1, 0, 2]>(h)"),
    "turned without perm": ("T,8", "y = Transpose(x)"),
    "flatten": ("T,2,4", "y = Flatten<axis=1>(x)"),
    "look up": ("T,8", "y = Gather(table, ids)"),
    "look up along the width": ("T,8", "u = Transpose<perm=[1, 0]>(table) y = Gather<axis=1>(u, ids)"),
    "pick channels": ("T,8", "k = Constant<value_ints=[3, 1]>() y = Gather<axis=1>(x, k)"),
    "pick a head": ("2,T,4", "y = Gather<axis=0>(x, i0)"),
    "gather elements": ("T,8", "u = ArgMax<axis=1>(x) y = GatherElements<axis=1>(x, u)"),
    "scatter elements": ("T,8", "u = ArgMax<axis=1>(x) v = ReduceMax(x, k1) y = ScatterElements<axis=1>(x, u, v)"),
    "slice": (
        "T,8",
        "s = Constant<value_ints=[1]>() e = Constant<value_ints=[3]>() k = Constant<value_ints=[1]>() y = Slice(x, s, e, k)",
    ),
    "pad the width": ("T,8", "n = Constant<value_ints=[0, 1, 0, 2]>() y = Pad(x, n)"),
    "tile the width": ("T,8", "n = Constant<value_ints=[1, 2]>() y = Tile(x, n)", "T,16"),
    "expand": ("T,1,8", "n = Constant<value_ints=[1, 3, 1]>() y = Expand(x, n)"),
    "expand to the number of tokens": (
        "T,8",
        "s = Shape<start=0, end=1>(x) n = Concat<axis=0>(s, k1) z = Expand(c1, n) y = Add(x, z)",
    ),
    "zeros like": ("T,8", "s = Shape(x) z = ConstantOfShape(s) y = Add(x, z)"),
    "where": ("T,8", "p = Greater(x, c1) y = Where(p, x, c8)"),
    "lower triangle of each token": ("T,2,4", "y = Trilu<upper=0>(x)"),
    "dequantised by channel": (
        "T,8",
        "u = QuantizeLinear<axis=1>(x, p8, z8) y = DequantizeLinear<axis=1>(u, p8, z8)",
    ),
    "batch of one": ("1,T,8", "y = Mul(x, c1)"),
}
MIXED = {
    "cumsum over tokens": ("T,8", "y = CumSum(x, i0)", "it works along the token axis"),
    "softmax over tokens": ("T,8", "y = Softmax<axis=0>(x)", "it works along the token axis"),
    "mean over tokens": ("T,8", "k = Constant<value_ints=[0]>() y = ReduceMean(x, k)", "its output has no token axis"),
    "mean over everything": ("T,8", "y = ReduceMean(x)", "its output has no token axis"),
    "scores": ("T,8", "t = Transpose<perm=[1, 0]>(x) y = MatMul(x, t)", "it multiplies tokens with each other"),
    "scores by head": (
        "2,T,4",
        "t = Transpose<perm=[0, 2, 1]>(x) y = MatMul(x, t)",
        "it multiplies tokens with each other",
    ),
    "scores as einsum": (
        "T,8",
        'y = Einsum<equation="td,sd->ts">(x, x)',
        "its inputs count tokens along different axes",
    ),
    "gram": ("T,8", "t = Transpose<perm=[1, 0]>(x) y = MatMul(t, x)", "its output has no token axis"),
    "gram as einsum": ("T,8", 'y = Einsum<equation="ti,tj->ij">(x, x)', "its output has no token axis"),
    "tokens turned away": (
        "T,8",
        "u = ReduceMax<keepdims=1>(x, k1) v = Transpose<perm=[1, 0]>(u) y = Add(u, v)",
        "its inputs count tokens along different axes",
    ),
    "norm over tokens": ("8,T", "y = RMSNormalization<axis=0>(x, c8T)", "it works along the token axis"),
    "layer norm over tokens": ("4,8,T", "y = LayerNormalization<axis=1>(x, c8T)", "it works along the token axis"),
    "instance norm": (
        "2,8,T",
        "y = InstanceNormalization(x, c8, c8)",
        "InstanceNormalization is not known to keep tokens apart",
    ),
    "convolution": (
        "1,8,T",
        "y = Conv<kernel_shape=[3], pads=[1, 1]>(x, conv)",
        "Conv is not known to keep tokens apart",
    ),
    "quantised by the largest": (
        "T,8",
        "u, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(u, s, z)",
        "DynamicQuantizeLinear is not known to keep tokens apart",
    ),
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
    "reversed": (
        "T,8",
        "s = Constant<value_ints=[-1]>() e = Constant<value_ints=[-99]>() k = Constant<value_ints=[0]>()"
        " y = Slice(x, s, e, k, s)",
        "its output has no token axis",
    ),
    "pick": ("T,8", "m = Clip(ids, i2, i2) y = Gather<axis=0>(x, m)", "it picks among tokens"),
    "gather elements of others": (
        "T,8",
        "n = Cast<to=7>(x) z = Clip(n, i2, i2) y = GatherElements<axis=0>(x, z)",
        "it works along the token axis",
    ),
    "number of tokens": ("T,8", "s = Shape(x) y = Cast<to=1>(s)", "its output has no token axis"),
    "divided by the number of tokens": (
        "T,8",
        "s = Shape<start=0, end=1>(x) n = Cast<to=1>(s) y = Div(x, n)",
        "it depends on the number of tokens in the step",
    ),
    "place in the step": (
        "T,8",
        "s = Shape<start=0, end=1>(x) k = Constant<value_ints=[0]>() n = Squeeze(s, k) d = Constant<value_int=1>()"
        " r = Range(i0, n, d) f = Cast<to=1>(r) u = Unsqueeze(f, k1) y = Add(x, u)",
        None,
    ),
    "merged": ("2,T,4", "n = Constant<value_ints=[-1, 4]>() y = Reshape(x, n)", "its output has no token axis"),
    "heads before tokens": (
        "2,T,4",
        "n = Constant<value_ints=[-1, 2, 4]>() y = Reshape(x, n)",
        "its output has no token axis",
    ),
}
CAUTIOUS = {
    "unknown shape": ("T,8", "y = Reshape(x, ids)", "the shape of y is not known"),
    "squeeze of whatever is one": ("T,1", "y = Squeeze(x)", "the shape of y is not known"),
    "subgraph": (
        "T,8",
        "n = Size(ids) b = Greater(n, i0) y = If(b) <then_branch = g1 () => (float[T,8] a) { a = Neg(x) },"
        " else_branch = g2 () => (float[T,8] a2) { a2 = Exp(x) }>",
        "If holds a graph of its own, which is not looked into",
    ),
}


def make(shape: str, line: str, out: str = "") -> Graph:
    """`out` is the output's shape where ONNX can't infer it."""
    frame = FRAME.replace("(float y)", f"(float[{out}] y)") if out else FRAME
    return small_graph(frame.format(shape, line), **MORE)


def influence(graph: Graph, tokens: int = 5) -> float:
    """How much the other rows of the outputs change when row 2 of the inputs does, or when the last row is left out."""
    x = next(t for t in graph.surgeon.inputs if t.name == "x")
    axis, worst = token_axis(x), 0.0
    assert axis is not None
    full = rows(*(tokens if d == "T" else d for d in x.shape))
    ids = np.arange(tokens) % 12
    changed, other = full.copy(), ids.copy()
    np.moveaxis(changed, axis, 0)[2] = rows(*np.moveaxis(full, axis, 0)[2].shape, seed=11) * 3
    other[2] = 9
    short = np.moveaxis(np.moveaxis(full, axis, 0)[:-1], 0, axis)
    plain = run(graph, {"x": full, "ids": ids})
    for feeds in ({"x": changed, "ids": other}, {"x": short, "ids": ids[:-1]}):
        for out, a, b in zip(graph.surgeon.outputs, plain, run(graph, feeds), strict=True):
            kept = [i for i in range(len(feeds["ids"])) if i != 2]
            if (at := token_axis(out)) is not None:
                a, b = np.take(a, kept, at), np.take(b, kept, at)
            if a.shape != b.shape:
                return float("inf")
            worst = max(worst, float(np.abs(a.astype(float) - b.astype(float)).max()))
    return worst


@pytest.mark.parametrize("case", APART.values(), ids=APART)
def test_what_keeps_tokens_apart_passes(case: tuple[str, ...]) -> None:
    graph = make(*case)
    assert mixing_node(graph) is None
    assert influence(graph) < 1e-5


@pytest.mark.parametrize(("shape", "line", "reason"), MIXED.values(), ids=MIXED)
def test_what_mixes_tokens_is_named(shape: str, line: str, reason: str | None) -> None:
    graph = make(shape, line)
    result = mixing_node(graph)
    assert result is not None and isinstance(result[0], gs.Node)
    assert reason is None or result[1] == reason
    assert influence(graph) > 1e-3, "one row reaches another"


@pytest.mark.parametrize("case", CAUTIOUS.values(), ids=CAUTIOUS)
def test_what_cannot_be_told_is_named(case: tuple[str, ...]) -> None:
    shape, line, reason, *out = case
    result = mixing_node(make(shape, line, *out))
    assert result is not None and result[1] == reason


AXES = st.integers(-3, 2)
STEPS = st.one_of(
    AXES.map(lambda a: f"Softmax<axis={a}>({{0}})"),
    AXES.map(lambda a: f"CumSum({{0}}, a{a % 3})"),
    AXES.map(lambda a: f"ReduceMax<keepdims=1>({{0}}, l{a % 3})"),
    AXES.map(lambda a: f"Concat<axis={a}>({{0}}, {{1}})"),
    AXES.map(lambda a: f"Gather<axis={a}>({{0}}, flip)"),
    AXES.map(lambda a: f"LayerNormalization<axis={a}>({{0}}, one)"),
    st.permutations(range(3)).map(lambda p: f"Transpose<perm=[{p[0]}, {p[1]}, {p[2]}]>({{0}})"),
    st.permutations((0, 2, 4)).map(lambda p: f"Reshape({{0}}, to{p[0]}{p[1]}{p[2]})"),
    st.sampled_from(["Add({0}, {1})", "MatMul({0}, {1})", "Mul({0}, one)", "Neg({0})", "Trilu({0})", "Tanh({1})"]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.permutations(["T", 2, 4]), st.lists(STEPS, min_size=1, max_size=4))
def test_random_graphs_are_right_or_refused(shape: list, lines: list[str]) -> None:
    """Whatever is accepted keeps rows apart when it is run."""
    names = ["x", "x", *(f"v{i}" for i in range(len(lines)))]
    body = [f"v{i} = {line.format(names[i + 1], names[i])}" for i, line in enumerate(lines)]
    more = {f"a{i}": np.array(i) for i in range(3)} | {f"l{i}": np.array([i]) for i in range(3)}
    more |= {f"to{a}{b}{c}": np.array([a or -1, b or -1, c or -1]) for a, b, c in permutations((0, 2, 4))}
    more |= {"flip": np.array([1, 0]), "one": np.array([1.5], np.float32)}
    text = f"m (float[{','.join(map(str, shape))}] x, int64[T] ids) => (float v) {{ {' '.join(body)} v = Abs({names[-1]}) }}"
    try:
        graph = small_graph(text, **more)
        run(graph, {"x": rows(*(5 if d == "T" else d for d in shape)), "ids": np.arange(5)})
    except Exception:  # shapes that don't fit: not a graph
        reject()
    refused = mixing_node(graph) is not None
    event("refused" if refused else "accepted")
    assert refused or influence(graph) < 1e-4
