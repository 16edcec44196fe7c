from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import attention_graph, padded_tokens, refused, run
from steps import worst_error

from llmlab.graph.analysis.rows import mixing_node
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.optimize import optimize
from llmlab.graph.passes.pack_tokens import PackTokens
from llmlab.graph.passes.page_attention import PageAttention
from llmlab.graph.passes.recognise_mask import WINDOW

COS, SIN = (f(np.outer(np.arange(64), [1.0, 0.1])).astype(np.float32) for f in (np.cos, np.sin))
ROPE = "rq = RotaryEmbedding(q, cos, sin, {0}) rk = RotaryEmbedding(k, cos, sin, {0}) a = Attention<is_causal=1>(rq, rk, v)"


def paged(before: Graph) -> tuple[Graph, gs.Node]:
    after = optimize(before, passes=[PackTokens, PageAttention])
    assert after.history[-1].rewrites == 1 and after.kind == "serving"
    return after, next(n for n in after.surgeon.nodes if n.op == "PagedAttention")


def one_prompt(after: Graph, feeds: dict[str, Any]) -> np.ndarray:
    """The first sequence's tokens, 4 a step, through blocks of 3 that lie backwards."""
    interpreter, done, found = Interpreter(after, num_blocks=5, block_size=3), 0, []
    ids = feeds["input_ids"][0]
    while done < len(ids):
        new = min(4, len(ids) - done)
        step = {
            "input_ids": ids[done : done + new],
            "position_ids": np.arange(done, done + new),
            "query_start": np.array([0, new], np.int32),
            "kv_len": np.array([done + new], np.int32),
            "block_table": np.array([[4, 3, 2, 1, 0]], np.int32),
        }
        found.append(interpreter.step(step))
        done += new
    return np.concatenate(found)


def equal(before: Graph, after: Graph) -> None:
    feeds = padded_tokens(batch=1, sequence=14)
    assert worst_error(one_prompt(after, feeds), run(before, feeds)[0][0]) < 2e-6


@pytest.mark.parametrize(
    ("attrs", "name", "expected"),
    [
        ("", "scale", pytest.approx(1 / math.sqrt(4))),
        (", scale=0.3", "scale", pytest.approx(0.3)),
        (", softcap=1.5", "softcap", 1.5),
    ],
)
def test_attention_becomes_the_plugin_node(attrs: str, name: str, expected: Any) -> None:
    before = attention_graph(f"a = Attention<is_causal=1{attrs}>(q, k, v)")
    after, node = paged(before)
    assert node.attrs[name] == expected
    assert (node.attrs["num_heads"], node.attrs["kv_num_heads"], node.attrs["head_dim"]) == (2, 1, 4)
    assert [layer.kv_heads for layer in after.kv_layers()] == [1]
    equal(before, after)


def test_a_window_travels_along() -> None:
    before = attention_graph()
    next(n for n in before.surgeon.nodes if n.op == "Attention").attrs[WINDOW] = 3
    after, node = paged(before)
    assert node.attrs["window"] == 3
    masked = attention_graph(
        "a = Attention(q, k, v, window)", window=np.tril(np.ones((14, 14), bool)) & np.triu(np.ones((14, 14), bool), -2)
    )
    equal(masked, after)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope_moves_into_the_node(interleaved: int) -> None:
    line = ROPE.format("position_ids").replace("RotaryEmbedding(", f"RotaryEmbedding<interleaved={interleaved}>(")
    before = attention_graph(line, cos=COS, sin=SIN)
    after, node = paged(before)
    assert node.attrs["interleaved"] == interleaved and len(node.inputs) == 10
    assert not any(n.op == "RotaryEmbedding" for n in after.surgeon.nodes)
    equal(before, after)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_partial_rope_moves_into_the_node(interleaved: int) -> None:
    line = (
        ROPE.format("position_ids")
        .replace("RotaryEmbedding(", f"RotaryEmbedding<rotary_embedding_dim=2, interleaved={interleaved}>(")
        .replace("cos", "cos1")
        .replace("sin", "sin1")
    )
    before = attention_graph(line, cos1=COS[:, :1], sin1=SIN[:, :1])
    after, node = paged(before)
    assert node.inputs[8].shape == (64, 1) and not any(n.op == "RotaryEmbedding" for n in after.surgeon.nodes)
    equal(before, after)


@pytest.mark.parametrize(("picked", "width"), [([0, 1, 2], 4), ([0, 1, 2, 3, 1, 0], 6)], ids=["narrower", "wider"])
def test_values_may_have_heads_of_another_size(picked: list[int], width: int) -> None:
    """The smaller ones are filled up with zeros, the result is cut; RoPE turns the channels that it turned before."""
    lines = f"some = Constant<value_ints={picked}>() v_ = Gather<axis=3>(v, some) " + ROPE.format("position_ids")
    lines = lines.replace("(rq, rk, v)", "(rq, rk, v_)").replace("a = ", "a_ = ")
    back = " back = Constant<value_ints=[0, 1, 2, 2]>() a = Gather<axis=3>(a_, back)"
    before = attention_graph(lines + back, cos=COS, sin=SIN)
    after, node = paged(before)
    assert node.attrs["head_dim"] == width and node.attrs["scale"] == pytest.approx(0.5)
    assert mixing_node(after) is None
    equal(before, after)


OUTSIDE = {
    "other positions": "one_ = Constant<value_int=1>() p = Add(position_ids, one_) " + ROPE.format("p"),
    "parts of the head": (
        "rq = RotaryEmbedding<rotary_embedding_dim=2>(q, cos1, sin1, position_ids) "
        "rk = RotaryEmbedding(k, cos, sin, position_ids) a = Attention<is_causal=1>(rq, rk, v)"
    ),
    "in two orders": ROPE.format("position_ids").replace(
        "rq = RotaryEmbedding(", "rq = RotaryEmbedding<interleaved=1>("
    ),
    "q alone": "rq = RotaryEmbedding(q, cos, sin, position_ids) a = Attention<is_causal=1>(rq, k, v)",
    "tables by row": "c = Gather(cos, position_ids) s = Gather(sin, position_ids) rq = RotaryEmbedding(q, c, s) rk = RotaryEmbedding(k, c, s) a = Attention<is_causal=1>(rq, rk, v)",
    "two tables": "rq = RotaryEmbedding(q, cos, sin, position_ids) rk = RotaryEmbedding(k, sin, cos, position_ids) a = Attention<is_causal=1>(rq, rk, v)",
}


@pytest.mark.parametrize("line", OUTSIDE.values(), ids=OUTSIDE)
def test_rope_that_the_node_cannot_do_stays_outside(line: str) -> None:
    before = attention_graph(line, cos=COS, sin=SIN, cos1=COS[:, :1], sin1=SIN[:, :1])
    after, node = paged(before)
    assert len(node.inputs) == 8 and any(n.op == "RotaryEmbedding" for n in after.surgeon.nodes)
    equal(before, after)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a = Attention(q, k, v, m)", "its mask was not recognised"),
        ("a = Attention(q, k, v)", "it is not causal: every token sees every other"),
        ("a, p1, p2 = Attention<is_causal=1>(q, k, v, , past, past)", "it has a KV cache of its own already"),
    ],
)
def test_other_attention_is_refused(line: str, reason: str) -> None:
    more = {"m": np.ones((1, 1), bool), "past": np.zeros((1, 1, 0, 4), np.float32)}
    assert refused(PageAttention, attention_graph(line, **more)) == reason


@pytest.mark.parametrize(
    "shape", [None, ["batch", "heads", "sequence", 4], ["batch", 2, "sequence", 8], ["batch", "sequence", 8]]
)
def test_unknown_heads_are_refused(shape: list | None) -> None:
    graph = attention_graph()
    next(n for n in graph.surgeon.nodes if n.op == "Attention").inputs[0].shape = shape
    assert refused(PageAttention, graph).startswith("q, k, v have shapes")


def test_heads_that_do_not_divide_are_refused() -> None:
    graph = attention_graph()
    next(n for n in graph.surgeon.nodes if n.op == "Attention").inputs[0].shape = ["batch", 3, "sequence", 4]
    for tensor in next(n for n in graph.surgeon.nodes if n.op == "Attention").inputs[1:]:
        tensor.shape = ["batch", 2, "sequence", 4]
    assert refused(PageAttention, graph) == "3 query heads don't divide into 2 KV heads"


def test_padded_tokens_are_refused() -> None:
    assert refused(PageAttention, attention_graph()) == "the tokens are not packed"
