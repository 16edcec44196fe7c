from __future__ import annotations

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
    ],
    ids=["as is", "turned first", "cos first", "other frequencies", "scaled"],
)
def test_primitives_become_one_node_with_tables(old: str, new: str) -> None:
    before = variant(old, new)
    after, report = apply(FuseRoPE, before)
    assert report.rewrites == 1 and ops(after) == {"RotaryEmbedding": 1}
    (node,) = after.surgeon.nodes
    assert [t.shape for t in node.inputs[1:3]] == [(64, 4), (64, 4)], "one row for every position of the model"
    same(before, after, feeds())


def test_q_and_k_share_their_tables() -> None:
    text = ROPE.replace("=> (float[B,2,S,8] y)", "=> (float[B,2,S,8] y, float[B,2,S,8] z)").replace(
        "y = Add(plain, crossed)", "y = Add(plain, crossed) p2 = Mul(x, c) z = Add(p2, crossed)"
    )
    after, report = apply(FuseRoPE, small_graph(text, inv_freq=INV_FREQ))
    a, b = after.surgeon.nodes
    assert report.rewrites == 2 and all(s is t for s, t in zip(a.inputs[1:], b.inputs[1:], strict=True))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "angle = Concat<axis=-1>(freqs, freqs)",
            "k = Constant<value_float=2.0>() f2 = Mul(freqs, k) angle = Concat<axis=-1>(freqs, f2)",
            "the two halves of cos or sin differ",
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
            "cos or sin depends on x",
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
        ("y = Add(plain, crossed)", "y = Sub(plain, crossed)"),
    ],
    ids=["no half turned", "other half", "not negated", "difference"],
)
def test_other_rotations_are_not_matched(old: str, new: str) -> None:
    _, report = apply(FuseRoPE, variant(old, new))
    assert report.rewrites == 0
