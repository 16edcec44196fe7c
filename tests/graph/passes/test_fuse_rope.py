from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph

from llmlab.graph.passes.fuse_rope import FuseRoPE

# x [B,2,S,8] turned by tables that are computed from the positions. `{}` makes `freqs` [B,S,4] from `p` [B,S,1].
ROPE = """m (float[B,2,S,8] x, int64[B,S] position_ids) => (float[B,2,S,8] y) {
    last = Constant<value_ints=[-1]>()
    heads = Constant<value_ints=[1]>()
    zero = Constant<value_ints=[0]>()
    half = Constant<value_ints=[4]>()
    end = Constant<value_ints=[9223372036854775807]>()
    pf = Cast<to=1>(position_ids)
    p = Unsqueeze(pf, last)
    freqs = Mul(p, inv_freq)
    angle = Concat<axis=-1>(freqs, freqs)
    c3 = Cos(angle)
    s3 = Sin(angle)
    c = Unsqueeze(c3, heads)
    s = Unsqueeze(s3, heads)
    first = Slice(x, zero, half, last)
    second = Slice(x, half, end, last)
    minus = Neg(second)
    turned = Concat<axis=-1>(minus, first)
    plain = Mul(x, c)
    crossed = Mul(turned, s)
    y = Add(plain, crossed)
}"""
INV_FREQ = np.array([1.0, 0.3, 0.1, 0.03], np.float32)


def feeds() -> dict[str, np.ndarray]:
    return {"x": rows(3, 2, 5, 8), "position_ids": np.random.default_rng(0).integers(0, 64, (3, 5))}


def variant(old: str, new: str):
    assert old in ROPE
    return small_graph(ROPE.replace(old, new), inv_freq=INV_FREQ)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = Add(plain, crossed)", "y = Add(plain, crossed)"),
        ("y = Add(plain, crossed)", "y = Add(crossed, plain)"),
        ("plain = Mul(x, c)", "plain = Mul(c, x)"),
        ("freqs = Mul(p, inv_freq)", "f0 = Mul(p, inv_freq) freqs = Mul(f0, f0)"),
        ("c3 = Cos(angle)", "k = Constant<value_float=1.5>() c0 = Cos(angle) c3 = Mul(c0, k)"),
        ("y = Add(plain, crossed)", "y = Sub(plain, crossed)"),
        (
            "first = Slice(x, zero, half, last)\n    second = Slice(x, half, end, last)",
            "n = Constant<value_ints=[4, 4]>() first, second = Split<axis=-1>(x, n)",
        ),
        ("c = Unsqueeze(c3, heads)", "c1 = Unsqueeze(c3, heads) c2 = Cast<to=11>(c1) c = Cast<to=1>(c2)"),
    ],
    ids=["as is", "turned first", "cos first", "other frequencies", "scaled", "the other way", "split", "cast"],
)
def test_primitives_become_one_node_with_tables(old: str, new: str) -> None:
    before = variant(old, new)
    after, report = apply(FuseRoPE, before)
    assert report.rewrites == 1 and ops(after) == {"RotaryEmbedding": 1}
    (node,) = after.surgeon.nodes
    assert [t.shape for t in node.inputs[1:3]] == [(64, 4), (64, 4)], "one row for every position of the model"
    same(before, after, feeds())


# Pairs side by side, written with strided slices; `{}` is how cos and sin come to [B,1,S,8].
NEIGHBOURS = """m (float[B,2,S,8] x, int64[B,S] position_ids) => (float[B,2,S,8] y) {
    last = Constant<value_ints=[-1]>()
    heads = Constant<value_ints=[1]>()
    zero = Constant<value_ints=[0]>()
    one = Constant<value_ints=[1]>()
    two = Constant<value_ints=[2]>()
    end = Constant<value_ints=[9223372036854775807]>()
    pf = Cast<to=1>(position_ids)
    p = Unsqueeze(pf, last)
    freqs = Mul(p, inv_freq)
    f1 = Unsqueeze(freqs, heads)
    c = Cos(f1)
    s = Sin(f1)
    even = Slice(x, zero, end, last, two)
    odd = Slice(x, one, end, last, two)
    ec = Mul(even, c)
    os = Mul(odd, s)
    oc = Mul(odd, c)
    es = Mul(even, s)
    a0 = Sub(ec, os)
    b0 = Add(oc, es)
    a = Unsqueeze(a0, last)
    b = Unsqueeze(b0, last)
    ab = Concat<axis=-1>(a, b)
    flat = Constant<value_ints=[0, 2, -1, 8]>()
    y = Reshape(ab, flat)
}"""
PARTIAL = (
    """m (float[B,2,S,12] z, int64[B,S] position_ids) => (float[B,2,S,12] out) {
    cut = Constant<value_ints=[8, 4]>()
    x, rest = Split<axis=-1>(z, cut)
"""
    + ROPE.partition("{")[2].rpartition("}")[0]
    + " out = Concat<axis=-1>(y, rest) }"
)
TOKENS_FIRST = ROPE.replace("[B,2,S,8]", "[B,S,2,8]").replace(
    "heads = Constant<value_ints=[1]>", "heads = Constant<value_ints=[2]>"
)
GATHERED = """m (float[B,2,S,8] x, int64[B,S] position_ids) => (float[B,2,S,8] y) {
    c = Gather(cos, position_ids)
    s = Gather(sin, position_ids)
    y = RotaryEmbedding(x, c, s)
}"""
WITHOUT_IDS = ROPE.replace(
    "pf = Cast<to=1>(position_ids)",
    "n0 = Shape<start=1, end=2>(position_ids) z0 = Constant<value_int=0>() o0 = Constant<value_int=1>()"
    " n1 = Squeeze(n0, zero) r = Range(z0, n1, o0) r2 = Unsqueeze(r, zero) pf = Cast<to=1>(r2)",
)


def table(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return function(np.arange(64)[:, None] * INV_FREQ).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "wanted", "attributes"),
    [
        (NEIGHBOURS, {"RotaryEmbedding": 1}, {"interleaved": 1}),
        (PARTIAL, {"RotaryEmbedding": 1}, {"interleaved": 0, "rotary_embedding_dim": 8}),
        (TOKENS_FIRST, {"Transpose": 2, "RotaryEmbedding": 1}, {"interleaved": 0}),
        (GATHERED, {"RotaryEmbedding": 1}, {"interleaved": 0}),
        (WITHOUT_IDS, {"RotaryEmbedding": 1}, {"interleaved": 0}),
    ],
    ids=["neighbours", "part of the head", "tokens before heads", "gathered by position", "without position_ids"],
)
def test_every_form_becomes_the_same_node(text: str, wanted: dict, attributes: dict) -> None:
    before = small_graph(text, inv_freq=INV_FREQ, cos=table(np.cos), sin=table(np.sin))
    after, report = apply(FuseRoPE, before)
    assert report.rewrites == 1 and ops(after) == wanted
    (node,) = (n for n in after.surgeon.nodes if n.op == "RotaryEmbedding")
    assert node.attrs == attributes and node.inputs[3].name == "position_ids"
    assert [t.shape for t in node.inputs[1:3]] == [(64, 4), (64, 4)]
    shape = [{"B": 3, "S": 5}.get(d, d) for d in before.surgeon.inputs[0].shape]
    positions = np.tile(np.arange(5), (3, 1)) if text is WITHOUT_IDS else feeds()["position_ids"]
    same(before, after, {before.surgeon.inputs[0].name: rows(*shape), "position_ids": positions})


def test_a_part_that_does_not_stay_as_it_is_is_refused() -> None:
    text = PARTIAL.replace("out = Concat<axis=-1>(y, rest)", "r2 = Neg(rest) out = Concat<axis=-1>(y, r2)")
    after, _ = apply(FuseRoPE, small_graph(text, inv_freq=INV_FREQ))
    assert all("rotary_embedding_dim" not in n.attrs for n in after.surgeon.nodes), (
        "only the part that turns may be fused"
    )
    same(small_graph(text, inv_freq=INV_FREQ), after, {**feeds(), "z": rows(3, 2, 5, 12)})


def test_heads_that_turn_differently_are_refused() -> None:
    text = ROPE.replace("c = Unsqueeze(c3, heads)", "c0 = Unsqueeze(c3, heads) c = Mul(c0, per_head)")
    graph = small_graph(text, inv_freq=INV_FREQ, per_head=np.array([1, 2], np.float32).reshape(1, 2, 1, 1))
    assert refused(FuseRoPE, graph) == "cos or sin can't be evaluated (heads are turned differently)"


def test_q_and_k_share_their_tables() -> None:
    text = ROPE.replace("=> (float[B,2,S,8] y)", "=> (float[B,2,S,8] y, float[B,2,S,8] z)").replace(
        "y = Add(plain, crossed)", "y = Add(plain, crossed) p2 = Mul(x, c) z = Add(p2, crossed)"
    )
    after, report = apply(FuseRoPE, small_graph(text, inv_freq=INV_FREQ))
    a, b = after.surgeon.nodes
    assert report.rewrites == 2 and all(s is t for s, t in zip(a.inputs[1:], b.inputs[1:], strict=True))


@pytest.mark.parametrize(
    ("reader", "left"),
    [
        ("z = MatMul(y0, w)", {"RotaryEmbedding": 1, "Mul": 1, "MatMul": 1}),
        ("z = Abs(y0)", {"RotaryEmbedding": 1, "Abs": 1}),
    ],
    ids=["read by a product", "read otherwise"],
)
def test_the_scale_of_scores_is_no_part_of_the_tables(reader: str, left: dict[str, int]) -> None:
    """What only a product reads is attention's scale: q and k would have different tables with it."""
    text = ROPE.replace(
        "y = Add(plain, crossed)", f"k = Constant<value_float=0.5>() y1 = Add(plain, crossed) y0 = Mul(y1, k) {reader}"
    )
    before = small_graph(text.replace("(float[B,2,S,8] y)", "(float[B,2,S,8] z)"), inv_freq=INV_FREQ, w=rows(8, 8))
    after, report = apply(FuseRoPE, before)
    assert report.rewrites == 1 and ops(after) == left
    same(before, after, feeds())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "angle = Concat<axis=-1>(freqs, freqs)",
            "k = Constant<value_float=2.0>() f2 = Mul(freqs, k) angle = Concat<axis=-1>(freqs, f2)",
            "the two channels of a pair turn differently, or the rest doesn't stay as it is",
        ),
        (
            "pf = Cast<to=1>(position_ids)",
            "k = Constant<value_ints=[1]>() m = ReduceMax(position_ids, k) q = Add(position_ids, m) pf = Cast<to=1>(q)",
            "cos or sin depend on more than a token's own position, such as the sequence's length",
        ),
        (
            "pf = Cast<to=1>(position_ids)",
            "n = Shape<start=1, end=2>(position_ids) q = Add(position_ids, n) pf = Cast<to=1>(q)",
            "cos or sin depend on more than a token's own position, such as the sequence's length",
        ),
        (
            "pf = Cast<to=1>(position_ids)",
            "k = Constant<value_int=0>() r = CumSum(position_ids, k) pf = Cast<to=1>(r)",
            "cos or sin depend on more than a token's own position, such as the sequence's length",
        ),
        (
            "c3 = Cos(angle)",
            "k = Constant<value_ints=[0, 1, 2, 3]>() m = ReduceMax<keepdims=0>(x, k) c0 = Cos(angle) c3 = Mul(c0, m)",
            "it turns no channel",
        ),
    ],
    ids=["halves", "largest position", "length", "cumulative", "activations"],
)
def test_anything_but_a_table_is_refused(old: str, new: str, reason: str) -> None:
    assert refused(FuseRoPE, variant(old, new)) == reason


def test_tables_that_cannot_be_evaluated_are_refused() -> None:
    """A stored table of fewer positions than the model has."""
    text = ROPE.replace("c3 = Cos(angle)", "c3 = Gather(stored, position_ids)")
    reason = refused(FuseRoPE, small_graph(text, inv_freq=INV_FREQ, stored=np.ones((9, 8), np.float32)))
    assert reason.startswith("cos or sin can't be evaluated (") and "\n" not in reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("turned = Concat<axis=-1>(minus, first)", "turned = Concat<axis=-1>(first, minus)"),
        ("half = Constant<value_ints=[4]>()", "half = Constant<value_ints=[2]>()"),
        ("minus = Neg(second)", "minus = Abs(second)"),
    ],
    ids=["no half turned", "other half", "not negated"],
)
def test_other_rotations_are_not_matched(old: str, new: str) -> None:
    _, report = apply(FuseRoPE, variant(old, new))
    assert report.rewrites == 0
