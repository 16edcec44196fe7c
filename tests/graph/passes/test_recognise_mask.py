from __future__ import annotations

import numpy as np
import pytest
from small_graphs import POSITIONS, apply, attention_graph, ops, padded_tokens, refused, run, same

from llmlab.graph.analysis.masks import classify
from llmlab.graph.passes.recognise_mask import ALIBI_SLOPES, WINDOW, RecogniseMask

ADDITIVE = """
    zero = Constant<value_float=0.0>()
    low = Constant<value_float=-1e38>()
"""
USE = "a = Attention(q, k, v, mask)"


def graph(mask: str, use: str = USE, **more: np.ndarray):
    return attention_graph(f"{POSITIONS}{mask}\n    {use}", **more)


def windowed(width: int) -> str:
    return f"w = Constant<value_int={width}>() d = Sub(query, key) near = Less(d, w) mask = And(causal, near)"


CAUSAL = {
    "boolean": "mask = Identity(causal)",
    "additive": ADDITIVE + "mask = Where(causal, zero, low)",
    "four axes": "ax = Constant<value_ints=[0, 1]>() mask = Unsqueeze(causal, ax)",
    "by trilu": ADDITIVE
    + "t = Shape(causal) o = ConstantOfShape<value=float[1] {1.0}>(t) u = Trilu<upper=0>(o) b = Cast<to=9>(u) mask = Where(b, zero, low)",
    "by positions": "pq = Unsqueeze(position_ids, ax2) pk = Unsqueeze(position_ids, ax1) c = LessOrEqual(pk, pq) mask = Unsqueeze(c, ax1)",
}


@pytest.mark.parametrize("mask", CAUSAL.values(), ids=CAUSAL)
def test_a_causal_mask_in_any_spelling(mask: str) -> None:
    before = graph("ax2 = Constant<value_ints=[2]>()" + mask)
    after, report = apply(RecogniseMask, before)
    assert report.rewrites == 1
    attention = next(n for n in after.surgeon.nodes if n.op == "Attention")
    assert attention.attrs["is_causal"] == 1 and WINDOW not in attention.attrs and len(attention.inputs) == 3
    assert "LessOrEqual" not in ops(after), "the mask's arithmetic is gone"
    same(before, after, padded_tokens())


@pytest.mark.parametrize("width", [1, 2, 5, 40, 63])
def test_a_window_is_measured(width: int) -> None:
    after, report = apply(RecogniseMask, graph(windowed(width)))
    attention = next(n for n in after.surgeon.nodes if n.op == "Attention")
    assert report.rewrites == 1 and attention.attrs[WINDOW] == width


def test_a_window_no_sequence_can_fill_is_none() -> None:
    after, report = apply(RecogniseMask, graph(windowed(500)))
    attention = next(n for n in after.surgeon.nodes if n.op == "Attention")
    assert report.rewrites == 1 and WINDOW not in attention.attrs


REFUSED = {
    "bidirectional": (
        "m0 = Or(causal, near) mask = Or(m0, far)",
        "attention is bidirectional; only causal self-attention can be paged",
    ),
    "looks ahead": (
        "i5 = Constant<value_int=5>() late = Equal(key, i5) mask = Or(causal, late)",
        "the mask lets tokens see later ones; only causal self-attention can be paged",
    ),
    "chunks": (
        "w = Constant<value_int=48>() cq = Div(query, w) ck = Div(key, w) e = Equal(cq, ck) mask = And(causal, e)",
        "attention stays within chunks of 48 tokens, which can't be paged",
    ),
    "every other": (
        "w = Constant<value_int=2>() d = Sub(query, key) r = Mod(d, w) e = Equal(r, i0) mask = And(causal, e)",
        "the mask is neither causal nor a window (at 3 tokens)",
    ),
    "bias": (
        ADDITIVE + "d = Sub(query, key) f = Cast<to=1>(d) b = Sqrt(f) minus = Neg(b) mask = Where(causal, minus, low)",
        "the mask adds numbers to the scores that are not ALiBi (at 7 tokens it is not linear in the key's position)",
    ),
    "bias by length": (
        ADDITIVE
        + "d = Sub(key, query) f = Cast<to=1>(d) long = Cast<to=1>(n0) b = Div(f, long) mask = Where(causal, b, low)",
        "the mask adds numbers to the scores that are not ALiBi (it changes with the sequence's length)",
    ),
    "padding": (
        "p = Equal(input_ids, i0) real0 = Not(p) ax = Constant<value_ints=[1, 2]>() real = Unsqueeze(real0, ax) mask = And(real, causal)",
        "the mask depends on the tokens themselves (m.p/Equal)",
    ),
    "heads": (
        "h = Constant<value=bool[1,2,1,1] {1, 0}>() l = Less(key, query) e = Equal(key, query) s = And(l, h) mask = Or(s, e)",
        "the mask differs between heads or sequences",
    ),
}


@pytest.mark.parametrize(("mask", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_masks_are_refused_by_name(mask: str, reason: str) -> None:
    helpers = "d1 = Sub(key, query) near = Less(d1, i2) far = GreaterOrEqual(d1, i2)"
    before = graph(f"i2 = Constant<value_int=2>() {helpers} {mask}")
    assert refused(RecogniseMask, before) == reason


def test_a_mask_from_an_activation_is_refused() -> None:
    before = graph(
        "s0 = MatMul(x, x2) mask = Greater(s0, zero)", x2=np.zeros((8, 1), np.float32), zero=np.array(0, np.float32)
    )
    assert refused(RecogniseMask, before).startswith("the mask depends on the tokens themselves")


def test_a_mask_that_cannot_be_evaluated_is_refused() -> None:
    """Positions looked up in a table that is too short: ONNX Runtime says no, the pass says why."""
    before = graph("q2 = Gather(stored, query) mask = LessOrEqual(key, q2)", stored=np.arange(5))
    reason = refused(RecogniseMask, before)
    assert reason.startswith("the mask can't be evaluated for 7 tokens (") and "\n" not in reason


DISTANCE = "d = Sub(key, query) f0 = Cast<to=1>(d) f = Mul(f0, slopes)"
ALIBI = {
    "distance": f"{DISTANCE} mask = Where(causal, f, low)",
    "key alone": "f0 = Cast<to=1>(key) f = Mul(f0, slopes) hide = Where(causal, zero, low) mask = Add(f, hide)",
    "from the end": "e = Sub(key, n0) f0 = Cast<to=1>(e) f = Mul(f0, slopes) mask = Where(causal, f, low)",
    "with a window": f"w = Constant<value_int=5>() dq = Sub(query, key) near = Less(dq, w) see = And(causal, near) {DISTANCE} mask = Where(see, f, low)",
}
SLOPES = np.array([0.3, 0.04], np.float32).reshape(1, 2, 1, 1)


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_in_any_spelling(name: str) -> None:
    """A constant for each query changes no softmax, so the bias may count from anywhere."""
    before = graph(ADDITIVE + ALIBI[name], slopes=SLOPES)
    after, report = apply(RecogniseMask, before)
    node = next(n for n in after.surgeon.nodes if n.op == "Attention")
    assert report.rewrites == 1 and node.attrs["is_causal"] == 1
    assert node.attrs.get(WINDOW, 0) == (5 if name == "with a window" else 0)
    np.testing.assert_allclose(node.inputs[ALIBI_SLOPES].values, [0.3, 0.04], rtol=1e-5)


def test_one_slope_for_all_heads() -> None:
    after, _ = apply(RecogniseMask, graph(ADDITIVE + ALIBI["distance"], slopes=SLOPES[:, :1]))
    node = next(n for n in after.surgeon.nodes if n.op == "Attention")
    np.testing.assert_allclose(node.inputs[ALIBI_SLOPES].values, [0.3, 0.3], rtol=1e-5)


def test_alibi_in_bfloat16_is_not_linear() -> None:
    """Rounded to eight bits, as some models compute it: far keys fall together."""
    bits = np.arange(300, dtype=np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000
    rounded = (bits.astype(np.uint32).view(np.float32) * 0.5).reshape(1, -1)
    cut = "en = Concat<axis=0>(n) f0 = Slice(stored, ax0, en, ax1)"
    before = graph(f"{ADDITIVE} {cut} mask = Where(causal, f0, low)", stored=rounded)
    mask = next(n for n in before.surgeon.nodes if n.op == "Attention").inputs[3]
    assert classify(mask, max_length=64).slopes == (0.5,)
    assert "not linear" in str(classify(mask, max_length=300).reason)


def test_a_bias_computed_in_bfloat16_is_evaluated() -> None:
    """ONNX Runtime's CPU multiplies no bfloat16, and NumPy has no such type: constants in it are left as nodes."""
    low = "narrow = Cast<to=16>(slopes) at = Cast<to=16>(key) f0 = Mul(narrow, at) f = Cast<to=1>(f0)"
    before = graph(f"{ADDITIVE} {low} hide = Where(causal, zero, low) mask = Add(f, hide)", slopes=SLOPES * 0 + 0.25)
    after, report = apply(RecogniseMask, before)
    node = next(n for n in after.surgeon.nodes if n.op == "Attention")
    assert report.rewrites == 1 and list(node.inputs[ALIBI_SLOPES].values) == [0.25, 0.25]


def test_a_mask_beside_is_causal_is_refused() -> None:
    before = graph("mask = Identity(causal)", "a = Attention<is_causal=1>(q, k, v, mask)")
    assert refused(RecogniseMask, before) == "both a mask and is_causal are given"


def table(length: int, width: int) -> np.ndarray:
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    return (key <= query) & (key > query - width)


SLICED = "st = Constant<value_ints=[0, 0]>() en = Concat<axis=0>(n, n) mask = Slice(stored, st, en)"


def test_a_stored_mask_is_evaluated_up_to_its_size() -> None:
    """As old models keep them: a table of max_position_embeddings squared, cut to size. 130 tokens can't be asked of it."""
    before = graph(SLICED, stored=table(64, 64))
    after, report = apply(RecogniseMask, before)
    assert report.rewrites == 1
    same(before, after, padded_tokens())


@pytest.mark.parametrize("width", [48, 200])
def test_a_window_hidden_in_a_stored_mask_is_found(width: int) -> None:
    """No constant in the arithmetic names it."""
    stored = table(256, width)
    before = graph(SLICED, stored=stored)
    mask = next(n for n in before.surgeon.nodes if n.op == "Attention").inputs[3]
    assert classify(mask, max_length=256).window == width
    assert run(before, padded_tokens())[0].shape == (2, 9, 12)


def test_a_window_too_long_to_be_measured_is_refused() -> None:
    before = graph(windowed(20_000))
    mask = next(n for n in before.surgeon.nodes if n.op == "Attention").inputs[3]
    assert "20000" in str(classify(mask, max_length=32_768).reason)
    assert classify(mask, max_length=16_384).reason is None
