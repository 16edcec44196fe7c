from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, rows, run, same, small_graph, weights

from llmlab.graph.passes.fold_constants import FoldConstants


def test_constants_in_all_spellings_are_computed() -> None:
    graph = small_graph(
        """m (float[N] x) => (float[N] y) {
            i = Constant<value_int=3>()
            f = Cast<to=1>(i)
            g = Constant<value_float=2.0>()
            h = Constant<value=float {0.5}>()
            a = Mul(f, g)
            b = Add(a, h)
            y = Mul(x, b)
        }""",
        fold=False,
    )
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and ops(after) == {"Mul": 1}
    same(graph, after, {"x": rows(5)})


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_stay_where_they_are(dtype: type) -> None:
    w = weights(w=(4, 8))["w"].astype(dtype)
    graph = small_graph(
        """m (float[N,8] x) => (float[N,4] y) {
            wide = Cast<to=1>(w)
            turned = Transpose<perm=[1,0]>(wide)
            y = MatMul(x, turned)
        }""",
        fold=False,
        w=w,
    )
    after, report = apply(FoldConstants, graph)
    assert report.matches == 0 and ops(after) == ops(graph)
    same(graph, after, {"x": rows(3, 8)})


def test_what_depends_on_an_input_stays() -> None:
    graph = small_graph("m (float[N] x) => (int64[1] y) { y = Shape(x) }", fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.matches == 0 and ops(after) == {"Shape": 1}


@pytest.mark.parametrize(
    ("size", "known"), [("Shape<start=-1>(x)", [8]), ("Shape<start=1>(x)", [4, 8]), ("Shape<start=1,end=2>(x)", [4])]
)
def test_sizes_that_are_known_are_constants(size: str, known: list[int]) -> None:
    graph = small_graph(f"m (float[N,4,8] x) => (int64[k] y) {{ a = {size} y = Identity(a) }}", fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and "Shape" not in ops(after)
    same(graph, after, {"x": rows(3, 4, 8)})
    assert run(graph, {"x": rows(3, 4, 8)})[0].tolist() == known


@pytest.mark.parametrize("size", ["Shape(x)", "Shape<end=1>(x)", "Shape<start=0,end=2>(x)"])
def test_sizes_that_tokens_bring_stay(size: str) -> None:
    graph = small_graph(f"m (float[N,4,8] x) => (int64[k] y) {{ y = {size} }}", fold=False)
    _, report = apply(FoldConstants, graph)
    assert report.matches == 0


TAKEN = """m (float[N,4,8] x, float[1] z) => (float[M] y) {{
    size = Shape(x)
    s1 = Constant<value_ints=[1]>()
    s2 = Constant<value_ints=[-2]>()
    last = Constant<value_ints=[-1]>()
    end = Constant<value_ints=[9223372036854775807]>()
    start = Constant<value_ints=[-9223372036854775808]>()
    at = Constant<value_int=-1>()
    both = Constant<value=int64[2,1] {{2, 1}}>()
    first = Constant<value_ints=[1, 0]>()
    taken = {}
    f = Cast<to=1>(taken)
    r = Sqrt(f)
    flat = Reshape(r, last)
    y = Mul(z, flat)
}}"""


@pytest.mark.parametrize(
    ("taken", "known"),
    [
        ("Slice(size, last, end)", [8]),
        ("Slice(size, s2, last)", [4]),
        ("Slice(size, s1, end, at0, s1)", [4, 8]),
        ("Gather(size, at)", [8]),
        ("Gather(size, both)", [8, 4]),
    ],
)
def test_known_sizes_that_are_taken_out_of_others_are_constants(taken: str, known: list[int]) -> None:
    """As torch computes the scale of q and k."""
    graph = small_graph(TAKEN.format(taken), fold=False, at0=np.zeros(1, np.int64))
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and ops(after) == {"Mul": 1}
    feeds = {"x": rows(3, 4, 8), "z": rows(1)}
    same(graph, after, feeds)
    np.testing.assert_allclose(run(graph, feeds)[0], feeds["z"] * np.sqrt(known), rtol=1e-6)


@pytest.mark.parametrize(
    "taken",
    [
        "Slice(size, start, last)",
        "Slice(size, last, start, at0, back)",  # backwards, down to the first
        "Gather(size, first)",
    ],
)
def test_sizes_that_tokens_bring_stay_whatever_is_taken(taken: str) -> None:
    given = {"at0": np.zeros(1, np.int64), "back": np.array([-1])}
    graph = small_graph(TAKEN.format(taken), fold=False, **given)
    after, _ = apply(FoldConstants, graph)
    assert ops(after)["Sqrt"] == ops(after)["Shape"] == 1
    same(graph, after, {"x": rows(3, 4, 8), "z": rows(1)})


LIKE = "m (int64[N] x) => ({}[N] y) {{ c = Constant<value_float=2.7>() a = {} y = Mul(a, {}) }}"


def test_a_constant_like_a_tensor_has_its_type() -> None:
    graph = small_graph(LIKE.format("int64", "CastLike(c, x)", "x"), fold=False)
    after, _ = apply(FoldConstants, graph)
    assert ops(after) == {"Mul": 1}
    same(graph, after, {"x": np.arange(5)})


def test_a_tensor_like_a_constant_stays() -> None:
    graph = small_graph(LIKE.format("float", "CastLike(x, c)", "c"), fold=False)
    after, _ = apply(FoldConstants, graph)
    assert ops(after)["CastLike"] == 1
    same(graph, after, {"x": np.arange(5)})


def test_olmo_norms_without_weights_get_theirs() -> None:
    """F.layer_norm without weights is traced as ones expanded to the size of the last axis."""
    graph = small_graph(
        """m (float[N,8] x) => (float[N,8] y) {
            one = Constant<value=float {1.0}>()
            size = Shape<start=-1>(x)
            w = Expand(one, size)
            y = LayerNormalization<axis=-1>(x, w)
        }""",
        fold=False,
    )
    after, _ = apply(FoldConstants, graph)
    assert ops(after) == {"LayerNormalization": 1}
    same(graph, after, {"x": rows(3, 8)})


def test_large_results_are_not_written_out() -> None:
    graph = small_graph(
        """m (float[N,8] x) => (float[N,400,400] y) {
            one = Constant<value=float {1.0}>()
            size = Constant<value_ints=[1, 400, 400]>()
            w = Expand(one, size)
            s = Gather<axis=1>(x, i)
            y = Add(w, s)
        }""",
        fold=False,
        i=np.zeros((1, 1), np.int64),
    )
    after, _ = apply(FoldConstants, graph)
    assert ops(after)["Expand"] == 1, "640 kB that Expand makes of four bytes"
    same(graph, after, {"x": rows(3, 8)})


IF = """m (float[N] x) => (float[N] y) {
    yes = Constant<value=bool {FLAG}>()
    y = If (yes) <
        then_branch = t () => (float[N] a) { a = Neg(x) },
        else_branch = e () => (float[N] b) { b = Exp(x) }
    >
}"""


@pytest.mark.parametrize(("flag", "left"), [("1", {"Neg": 1}), ("0", {"Exp": 1})])
def test_an_if_that_is_decided_is_one_branch(flag: str, left: dict[str, int]) -> None:
    graph = small_graph(IF.replace("FLAG", flag), fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.rewrites == 1 and ops(after) == left
    same(graph, after, {"x": rows(5)})


def test_an_if_that_depends_on_the_input_stays() -> None:
    text = IF.replace("float[N] x)", "float[N] x, bool flag)").replace(
        "yes = Constant<value=bool {FLAG}>()", "yes = Not(flag)"
    )
    graph = small_graph(text, fold=False)
    after, report = apply(FoldConstants, graph)
    assert report.matches == 0 and ops(after) == {"Not": 1, "If": 1}


def test_nodes_that_nobody_reads_are_gone() -> None:
    graph = small_graph(
        """m (float[N] x) => (float[N] y) {
            two = Constant<value_float=2.0>()
            dead = Exp(x)
            deader = Neg(dead)
            y = Mul(x, two)
        }""",
        fold=False,
    )
    after, report = apply(FoldConstants, graph)
    assert ops(after) == {"Mul": 1} and report.nodes_before == 4
    same(graph, after, {"x": rows(5)})
