from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, ops, refused, rows, same, small_graph

from llmlab.graph.passes.remove_gqa_expansion import RemoveGQAExpansion

# Two KV heads, each repeated for three query heads.
GQA = """m (float[B,6,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v) => (float[B,6,S,4] y) {
    axis = Constant<value_ints=[2]>()
    b = Shape<start=0, end=1>(q)
    s = Shape<start=2, end=3>(q)
    d = Constant<value_ints=[4]>()
    kv = Constant<value_ints=[2]>()
    group = Constant<value_ints=[3]>()
    h = Constant<value_ints=[6]>()
    wide = Concat<axis=0>(b, kv, group, s, d)
    merged = Concat<axis=0>(b, h, s, d)
    k1 = Unsqueeze(k, axis)
    v1 = Unsqueeze(v, axis)
    k2 = Expand(k1, wide)
    v2 = Expand(v1, wide)
    k3 = Reshape(k2, merged)
    v3 = Reshape(v2, merged)
    y = Attention<is_causal=1>(q, k3, v3)
}"""


def graph(*changes: tuple[str, str]):
    text = GQA
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    result = small_graph(text)
    shapes = {"k1": ["B", 2, 1, "S", 4], "k2": ["B", 2, 3, "S", 4], "k3": ["B", 6, "S", 4]}
    for name, tensor in result.surgeon.tensors().items():  # as torch declares them
        for key, shape in shapes.items():
            if name in (key, key.replace("k", "v")):
                tensor.shape = shape
    return result


def test_keys_and_values_are_not_repeated() -> None:
    before = graph()
    after, report = apply(RemoveGQAExpansion, before)
    assert report.rewrites == 1 and ops(after) == {"Attention": 1}
    same(before, after, {"q": rows(2, 6, 5, 4), "k": rows(2, 2, 5, 4, seed=1), "v": rows(2, 2, 5, 4, seed=2)})


def test_keys_alone_are_refused() -> None:
    before = graph(
        ("float[B,2,S,4] v)", "float[B,6,S,4] v)"),
        ("q, k3, v3", "q, k3, v"),
        ("v1 = Unsqueeze(v, axis)", "v1 = Unsqueeze(k, axis)"),
    )
    assert refused(RemoveGQAExpansion, before) == "keys and values are not expanded alike"


def test_repeating_the_whole_group_of_heads_is_refused() -> None:
    """[group, kv_heads] instead of [kv_heads, group]: query head h would read KV head h % 2, not h // 3."""
    before = graph()
    for name, tensor in before.surgeon.tensors().items():
        if name in ("k1", "v1"):
            tensor.shape = ["B", 1, 2, "S", 4]
        if name in ("k2", "v2"):
            tensor.shape = ["B", 3, 2, "S", 4]
    assert refused(RemoveGQAExpansion, before) == "the new axis is not the one behind the KV heads"


def test_unknown_shapes_are_refused() -> None:
    before = graph()
    before.surgeon.tensors()["k2"].shape = None
    assert refused(RemoveGQAExpansion, before) == "the shapes around the expansion are not known"


@pytest.mark.parametrize(("name", "shape"), [("k2", ["B", 2, 3, "S", 8]), ("k2", ["B", 2, "G", "S", 4])])
def test_expansion_along_other_axes_is_refused(name: str, shape: list) -> None:
    before = graph()
    before.surgeon.tensors()[name].shape = shape
    assert "not along the group axis alone" in refused(RemoveGQAExpansion, before)


# Heads repeated while they lie behind the sequence, and turned (RoPE) only then, as if there were six of them.
UNDER_ROPE = """m (float[B,6,S,4] q, float[B,S,2,1,4] k, float[B,S,2,1,4] v, int64[B,S] p) => (float[B,6,S,4] y) {
    b = Shape<start=0, end=1>(q)
    s = Shape<start=2, end=3>(q)
    d = Constant<value_ints=[4]>()
    kv = Constant<value_ints=[2]>()
    group = Constant<value_ints=[3]>()
    h = Constant<value_ints=[6]>()
    wide = Concat<axis=0>(b, s, kv, group, d)
    merged = Concat<axis=0>(b, s, h, d)
    k2 = Expand(k, wide)
    v2 = Expand(v, wide)
    k3 = Reshape(k2, merged)
    v3 = Reshape(v2, merged)
    k4 = Transpose<perm=[0,2,1,3]>(k3)
    v4 = Transpose<perm=[0,2,1,3]>(v3)
    k5 = RotaryEmbedding(k4, cos, sin, p)
    y = Attention<is_causal=1>(q, k5, v4)
}"""


def test_an_expansion_under_rope_goes() -> None:
    before = small_graph(UNDER_ROPE, cos=rows(9, 2), sin=rows(9, 2, seed=1))
    shapes = {"2": ["B", "S", 2, 3, 4], "3": ["B", "S", 6, 4], "4": ["B", 6, "S", 4], "5": ["B", 6, "S", 4]}
    for name, tensor in before.surgeon.tensors().items():
        if name[0] in "kv" and name[1:] in shapes:
            tensor.shape = shapes[name[1:]]
    after, report = apply(RemoveGQAExpansion, before)
    assert report.rewrites == 1 and "Expand" not in ops(after)
    assert [t.shape for t in after.surgeon.nodes[-1].inputs[1:3]] == [["B", 2, "S", 4]] * 2
    feeds = {"q": rows(2, 6, 5, 4), "k": rows(2, 5, 2, 1, 4, seed=1), "v": rows(2, 5, 2, 1, 4, seed=2)}
    same(before, after, feeds | {"p": np.tile(np.arange(5), (2, 1))})


def test_one_head_for_all_is_not_repeated() -> None:
    text = """m (float[B,6,S,4] q, float[B,1,S,4] k, float[B,1,S,4] v) => (float[B,6,S,4] y) {
        wide = Shape(q)
        k2 = Expand(k, wide)
        v2 = Expand(v, wide)
        y = Attention<is_causal=1>(q, k2, v2)
    }"""
    before = small_graph(text)
    for name in ("k2", "v2"):
        before.surgeon.tensors()[name].shape = ["B", 6, "S", 4]
    after, report = apply(RemoveGQAExpansion, before)
    assert report.rewrites == 1 and ops(after) == {"Attention": 1}
    same(before, after, {"q": rows(2, 6, 5, 4), "k": rows(2, 1, 5, 4, seed=1), "v": rows(2, 1, 5, 4, seed=2)})
    before.surgeon.tensors()["k2"].shape = ["B", 6, "S", 8]
    assert "is expanded to" in refused(RemoveGQAExpansion, before)
