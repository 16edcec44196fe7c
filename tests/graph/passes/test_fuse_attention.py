from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import POSITIONS, apply, attention_graph, ops, padded_tokens, refused, rows, run, same, small_graph

from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.optimize import optimize
from llmlab.graph.passes.fuse_attention import SINKS, FuseAttention
from llmlab.graph.passes.pack_tokens import PackTokens
from llmlab.graph.passes.page_attention import PageAttention
from llmlab.graph.passes.recognise_mask import ALIBI_SLOPES, RecogniseMask

SIZES = (
    POSITIONS
    + """
    b = Shape<start=0, end=1>(input_ids)
    zero = Constant<value_float=0.0>()
    low = Constant<value_float=-1e30>()
    c = Constant<value_float=0.6>()
    d = Constant<value_float=2.5>()
    mask = Where(causal, zero, low)
"""
)
TURN = "kt = Transpose<perm=[0,1,3,2]>(k)"
END = "p = Softmax<axis=-1>(s) a = MatMul(p, v)"
# [batch · heads, sequence, head_dim], as baddbmm wants it; both have two heads then.
MERGED = """
    two_ = Constant<value_ints=[2]>()
    bh = Mul(b, two_)
    four = Constant<value_ints=[4]>()
    flat_ = Concat<axis=0>(bh, n, four)
    square = Concat<axis=0>(bh, n, n)
    heads_ = Concat<axis=0>(b, two_, n, n)
    apart = Concat<axis=0>(b, two_, n, four)
    k2 = Concat<axis=1>(k, k)
    v2 = Concat<axis=1>(v, v)
    q3 = Reshape(q, flat_)
    k3 = Reshape(k2, flat_)
    v3 = Reshape(v2, flat_)
    kt = Transpose<perm=[0,2,1]>(k3)
    s0 = MatMul(q3, kt)
"""
SPELLED: dict[str, tuple[str, float, float]] = {
    "scores are scaled": (f"{TURN} s0 = MatMul(q, kt) s1 = Mul(s0, c) s = Add(s1, mask) {END}", 0.6, 0),
    "scores are divided": (f"{TURN} s0 = MatMul(q, kt) s1 = Div(s0, d) s = Add(mask, s1) {END}", 0.4, 0),
    "q is scaled": (f"{TURN} q2 = Mul(c, q) s0 = MatMul(q2, kt) s = Add(s0, mask) {END}", 0.6, 0),
    "q and k are": (
        f"{TURN} q2 = Mul(q, c) k2 = Mul(kt, c) s0 = MatMul(q2, k2) s = Add(s0, mask) {END}",
        0.36,
        0,
    ),
    "k before it turns": (
        f"k2 = Div(k, d) kt = Transpose<perm=[0,1,3,2]>(k2) s0 = MatMul(q, kt) s = Add(s0, mask) {END}",
        0.4,
        0,
    ),
    "k turns at once": (
        f"kt = Transpose<perm=[0,2,3,1]>(k1) s0 = MatMul(q, kt) s = Add(s0, mask) {END}",
        1.0,
        0,
    ),
    "no scale": (f"{TURN} s0 = MatMul(q, kt) s = Add(s0, mask) {END}", 1.0, 0),
    "hidden by Where": (f"{TURN} s0 = MatMul(q, kt) s = Where(causal, s0, low) {END}", 1.0, 0),
    "hidden by the other branch": (
        f"{TURN} s0 = MatMul(q, kt) late = Not(causal) s = Where(late, low, s0) {END}",
        1.0,
        0,
    ),
    "scaled after the mask": (f"{TURN} s0 = MatMul(q, kt) s1 = Add(s0, mask) s = Mul(s1, c) {END}", 0.6, 0),
    "softcap": (
        f"{TURN} s0 = MatMul(q, kt) s1 = Mul(s0, c) s2 = Div(s1, d) s3 = Tanh(s2) s4 = Mul(s3, d) s = Add(s4, mask) {END}",
        0.6,
        2.5,
    ),
    "softcap of one": (f"{TURN} s0 = MatMul(q, kt) s1 = Tanh(s0) s = Add(s1, mask) {END}", 1.0, 1.0),
    "own maximum": (
        f"{TURN} s0 = MatMul(q, kt) s1 = Add(s0, mask) ax = Constant<value_ints=[-1]>() m = ReduceMax<keepdims=1>(s1, ax) s = Sub(s1, m) {END}",
        1.0,
        0,
    ),
    "softmax in another type": (
        f"{TURN} s0 = MatMul(q, kt) s1 = Add(s0, mask) s = Cast<to=11>(s1) p0 = Softmax<axis=3>(s) p = Cast<to=1>(p0) a = MatMul(p, v)",
        1.0,
        0,
    ),
    "merged": (
        f"{MERGED} s1 = Mul(s0, c) s2 = Reshape(s1, heads_) s = Add(s2, mask) p0 = Softmax<axis=-1>(s) p = Reshape(p0, square) a3 = MatMul(p, v3) a = Reshape(a3, apart)".replace(
            "a3", "a_"
        ),
        0.6,
        0,
    ),
    "merged throughout": (
        f"{MERGED} s = Add(s0, mask) p = Softmax<axis=-1>(s) a_ = MatMul(p, v3) a = Reshape(a_, apart)",
        1.0,
        0,
    ),
    "NaN guarded": (
        f"{TURN} s0 = MatMul(q, kt) s = Add(s0, mask) p0 = Softmax<axis=-1>(s) bad = IsNaN(p0) p = Where(bad, zero, p0) a = MatMul(p, v)",
        1.0,
        0,
    ),
    "k turns merged": (
        """n1 = Constant<value_ints=[-1]>() four = Constant<value_ints=[4]>() two_ = Constant<value_ints=[2]>()
            flat_ = Concat<axis=0>(n1, n, four) apart = Concat<axis=0>(b, two_, four, n)
            k2 = Concat<axis=1>(k, k) v2 = Concat<axis=1>(v, v) m3 = Reshape(k2, flat_) t3 = Transpose<perm=[0,2,1]>(m3) kt = Reshape(t3, apart)
            k4 = Mul(kt, c) q2 = Mul(q, c) s0 = MatMul(q2, k4) s = Add(s0, mask) p = Softmax<axis=-1>(s) a = MatMul(p, v2)""",
        0.36,
        0,
    ),
    "no mask": (f"{TURN} s0 = MatMul(q, kt) s = Mul(s0, c) {END}", 0.6, 0),
}


def spelled(line: str, **more: np.ndarray) -> Graph:
    """The attention graph, its shapes completed as torch's exporter gives them."""
    graph = attention_graph(SIZES + line, **more)
    known = {"q3": ["2*batch", "sequence", 4], "k3": ["2*batch", "sequence", 4], "v3": ["2*batch", "sequence", 4]}
    known |= {"kt": ["2*batch", 4, "sequence"], "a_": ["2*batch", "sequence", 4]} if "q3" in line else {}
    known |= {n: ["2*batch", "sequence", "sequence"] for n in ("s0", "s1", "p", "s")} if "q3" in line else {}
    known |= {"m3": [None, "sequence", 4], "t3": [None, 4, "sequence"], "k4": ["batch", 2, 4, "sequence"]}
    known |= {"kt": ["batch", 2, 4, "sequence"]} if "m3" in line else {}
    known |= {"a": ["batch", 2, "sequence", 4], "s2": ["batch", 2, "sequence", "sequence"]}
    if "s2 = Reshape" in line:
        known |= {n: ["batch", 2, "sequence", "sequence"] for n in ("s", "p0")}
    for name, tensor in graph.surgeon.tensors().items():
        if name in known and isinstance(tensor, gs.Variable):
            tensor.shape = known[name]
    return graph


def attention(graph: Graph) -> gs.Node:
    return next(n for n in graph.surgeon.nodes if n.op == "Attention")


@pytest.mark.parametrize(("line", "scale", "softcap"), SPELLED.values(), ids=SPELLED)
def test_attention_in_any_spelling(line: str, scale: float, softcap: float) -> None:
    before = spelled(line)
    after, report = apply(FuseAttention, before)
    assert report.rewrites == 1 and not {"Softmax", "Tanh"} & set(ops(after))
    node = attention(after)
    assert node.attrs["scale"] == pytest.approx(scale) and node.attrs.get("softcap", 0) == softcap
    if not softcap:  # ONNX Runtime bends masked scores, too
        same(before, after, padded_tokens())
    masked, seen = apply(RecogniseMask, after)
    assert seen.rewrites == seen.matches
    if seen.rewrites:
        assert worst(before, masked) < 1e-5


def one_prompt(graph: Graph) -> np.ndarray:
    """The logits of the first sequence in two chunks, through PagedAttention in NumPy."""
    paged = optimize(graph, passes=[PackTokens, PageAttention])
    assert paged.history[-1].rewrites == 1, paged.history[-1].near_misses
    interpreter, ids, found = Interpreter(paged, num_blocks=3, block_size=4), padded_tokens()["input_ids"][0], []
    for start, stop in ((0, 5), (5, 9)):
        step = {
            "input_ids": ids[start:stop],
            "position_ids": np.arange(start, stop),
            "query_start": np.array([0, stop - start], np.int32),
            "kv_len": np.array([stop], np.int32),
            "block_table": np.array([[2, 0, 1]], np.int32),
        }
        found.append(interpreter.step(step))
    return np.concatenate(found)


def worst(before: Graph, after: Graph) -> float:
    found, expected = one_prompt(after), run(before, padded_tokens())[0][0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


SINK = """
    q4 = Constant<value_ints=[1, 2, 1, 1]>() wide_ = Reshape(sinks, q4) two_ = Constant<value_ints=[2]>() one_ = Constant<value_ints=[1]>()
    shape_ = Concat<axis=0>(b, two_, n, one_) sink = Expand(wide_, shape_)
    s0 = MatMul(q, kt) s1 = Mul(s0, c) s2 = Add(s1, mask) s3 = Concat<axis=-1>(s2, sink)
    ax = Constant<value_ints=[-1]>() m = ReduceMax<keepdims=1>(s3, ax) s4 = Sub(s3, m) p0 = Softmax<axis=-1>(s4)
    st = Constant<value_ints=[0]>() en = Constant<value_ints=[{}]>() la = Constant<value_ints=[3]>() p = Slice(p0, st, en, la)
    a = MatMul(p, v)
"""
SINKS_OF_TWO = np.array([1.5, -0.5], np.float32)


def with_sinks(cut: int = -1, sinks: np.ndarray = SINKS_OF_TWO) -> Graph:
    graph = spelled(TURN + SINK.format(cut), sinks=sinks)
    next(t for n, t in graph.surgeon.tensors().items() if n == "sink").shape = ["batch", 2, "sequence", 1]
    return graph


def test_a_sink_is_a_logit_of_each_head() -> None:
    before = with_sinks()
    after, report = apply(FuseAttention, before)
    assert report.rewrites == 1
    np.testing.assert_array_equal(attention(after).inputs[SINKS].values, SINKS_OF_TWO)
    masked, _ = apply(RecogniseMask, after)
    assert worst(before, masked) < 1e-5
    assert worst(with_sinks(sinks=SINKS_OF_TWO[::-1].copy()), masked) > 1e-2


def test_alibi_arrives_as_slopes() -> None:
    line = f"far = Sub(key, query) near = Cast<to=1>(far) bias = Mul(slopes, near) {TURN} s0 = MatMul(q, kt) s1 = Add(s0, bias) s = Where(causal, s1, low) {END}"
    slopes = np.array([0.5, 0.125], np.float32).reshape(1, 2, 1, 1)
    before = spelled(line, slopes=slopes)
    after, _ = apply(FuseAttention, before)
    same(before, after, padded_tokens())
    masked, report = apply(RecogniseMask, after)
    assert report.rewrites == 1
    np.testing.assert_allclose(attention(masked).inputs[ALIBI_SLOPES].values, slopes.reshape(-1))
    assert worst(before, masked) < 1e-5
    assert worst(spelled(line, slopes=slopes[:, ::-1].copy()), masked) > 1e-2


REFUSED = {
    "tokens in between": (
        f"{TURN} s0 = MatMul(q, kt) u = MatMul(q, kt) s1 = Add(s0, u) s = Add(s1, mask) {END}",
        "m.s1/Add joins the scores with what depends on the tokens",
    ),
    "scaled by a token": (
        f"{TURN} s0 = MatMul(q, kt) ax = Constant<value_ints=[-1]>() m = ReduceMean<keepdims=1>(q, ax) s1 = Mul(s0, m) s = Add(s1, mask) {END}",
        "m.s1/Mul joins the scores with what depends on the tokens",
    ),
    "divided by the scores": (
        f"{TURN} s0 = MatMul(q, kt) s1 = Div(c, s0) s = Add(s1, mask) {END}",
        "m.s1/Div joins the scores with what depends on the tokens",
    ),
    "scaled by positions": (
        f"{TURN} s0 = MatMul(q, kt) far = Cast<to=1>(query) s1 = Mul(s0, far) s = Add(s1, mask) {END}",
        "m.s1/Mul scales the scores by what is no constant",
    ),
    "another function": (
        f"{TURN} s0 = MatMul(q, kt) s1 = Sigmoid(s0) s = Add(s1, mask) {END}",
        "m.s1/Sigmoid (Sigmoid) is between its product and its softmax",
    ),
    "softcap over the mask": (
        f"{TURN} s0 = MatMul(q, kt) s1 = Add(s0, mask) s = Tanh(s1) {END}",
        "m.s/Tanh bends scores that are masked or bent already",
    ),
    "no product": (
        f"s1 = Exp(mask) s = Add(s1, mask) {END}",
        "m.s/Add joins the scores with what depends on the tokens",
    ),
    "over the queries": (
        f"{TURN} s0 = MatMul(q, kt) s = Add(s0, mask) p = Softmax<axis=2>(s) a = MatMul(p, v)",
        "its softmax is not over the last axis",
    ),
}


@pytest.mark.parametrize(("line", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_scores_are_refused(line: str, reason: str) -> None:
    assert refused(FuseAttention, spelled(line)) == reason


def test_more_than_the_sink_cut_off_is_refused() -> None:
    assert refused(FuseAttention, with_sinks(cut=-2)) == "more is cut off its scores than the sink"


def test_a_sink_that_differs_by_query_is_refused() -> None:
    graph = with_sinks()
    sink = next(n for n in graph.surgeon.nodes if n.op == "Expand")
    sink.inputs[0] = gs.Constant("by_query", np.zeros((1, 2, 9, 1), np.float32))
    assert refused(FuseAttention, graph) == "what is joined to its scores is not one constant a head"


def test_heads_that_merge_in_another_order_are_refused() -> None:
    """[sequence, batch · heads, ...]: the product runs, over other pairs."""
    graph = spelled(SPELLED["merged"][0])
    for tensor in graph.surgeon.tensors().values():
        if tensor.name == "q3":
            tensor.shape = ["sequence", "2*batch", 4]
    assert refused(FuseAttention, graph).startswith("q, k, v have shapes")


@pytest.mark.parametrize(
    ("guard", "of"),
    [("bad = IsNaN(s)", "0.0"), ("bad = IsInf(p0)", "0.0"), ("bad = IsNaN(p0)", "1.0")],
    ids=["of the scores", "infinite", "one instead"],
)
def test_weights_that_are_chosen_otherwise_are_no_attention(guard: str, of: str) -> None:
    line = f"{TURN} s0 = MatMul(q, kt) s = Add(s0, mask) p0 = Softmax<axis=-1>(s) {guard} o = Constant<value_float={of}>() p = Where(bad, o, p0) a = MatMul(p, v)"
    _, report = apply(FuseAttention, spelled(line))
    assert report.matches == 0


def test_keys_split_into_other_heads_are_refused() -> None:
    """[batch · heads, ...] read as other heads than were merged."""
    graph = spelled(SPELLED["k turns merged"][0])
    graph.surgeon.tensors()["k4"].shape = graph.surgeon.tensors()["kt"].shape = ["other", 2, 4, "sequence"]
    assert refused(FuseAttention, graph).startswith("q, k, v have shapes")


def test_a_router_is_no_attention() -> None:
    """A softmax whose result is multiplied with a weight."""
    graph = small_graph("m (float[N,4] x) => (float[N,4] y) { p = Softmax<axis=-1>(x) y = MatMul(p, w) }", w=rows(4, 4))
    _, report = apply(FuseAttention, graph)
    assert report.matches == 0
