"""One graph for a plugin: what its nodes say of themselves is what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
import tiny
from conftest import Store
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from steps import RAGGED, worst_error

import llmlab as ll
from llmlab.graph.graph import LLMLAB_DOMAIN, Graph
from llmlab.graph.interpret import KERNELS, Interpreter
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Dense
from llmlab.graph.store.storage import read_onnx, write_onnx
from llmlab.kernels.reference import paged_attention
from llmlab.tensorrt.attention_node import AttentionNode

BLOCKS, BLOCK_SIZE = 48, 4


class PagedAttention(OpRun):
    """The node as the plugin reads it."""

    op_domain = LLMLAB_DOMAIN

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[np.ndarray, ...]:
        node = AttentionNode.from_attributes(attributes)
        given = dict(zip(node.inputs, inputs, strict=True))
        node.check_types([str(i.dtype) for i in inputs])
        node.check_shapes([i.shape for i in inputs])
        if node.packed:
            qkv, kv = given["qkv"], node.kv_num_heads * node.head_dim
            given |= zip("qkv", np.split(qkv, [node.width, node.width + kv], axis=1), strict=True)
        order = ("q", "k", "v", "pool", "query_start", "kv_len", "block_table", "position_ids")
        return paged_attention(
            *(given[n] for n in order),
            **{n: given.get(n) for n in ("cos", "sin", "alibi_slopes", "sinks")},
            num_heads=node.num_heads,
            kv_num_heads=node.kv_num_heads,
            head_dim=node.head_dim,
            scale=node.scale,
            window=node.window,
            softcap=node.softcap,
            interleaved=bool(node.interleaved),
        )


def in_plugin(graph: Graph, folder: Path, dialect: int = 23) -> Graph:
    """The lowered graph, written to a folder and read back."""
    lowered = lower(graph, hosting="plugin", dialect=dialect, block_size=BLOCK_SIZE)
    (part,) = lowered.parts
    assert isinstance(part, Dense) and not lowered.tables and list(lowered.tensors) == ["logits"]
    write_onnx(part.graph.surgeon, folder)
    return Graph(read_onnx(folder), graph.config)


def error(half: Graph, graph: Graph, hosted: Graph) -> float:
    """How far the hosted graph's logits are from the graph's, in units of the largest one; worst of RAGGED's steps."""
    kernels = [k for k in KERNELS if k.__name__ != "PagedAttention"]
    evaluator = ReferenceEvaluator(hosted.to_onnx(), new_ops=[PagedAttention, *kernels])
    interpreter, pools = Interpreter(graph, BLOCKS, BLOCK_SIZE), Interpreter(half, BLOCKS, BLOCK_SIZE).caches
    worst = 0.0
    for batch, _ in steps.batches(RAGGED, tiny.VOCAB, steps.paged_tables(RAGGED, 4, BLOCKS), steps.some_rows):
        feeds = steps.feeds(batch)
        step = {n: a.astype(np.int32) for n, a in feeds.items()} | {"slots": np.zeros(len(batch.input_ids), np.int64)}
        logits, *updated = evaluator.run(None, {**step, **pools})
        pools = dict(zip(pools, updated, strict=True))
        assert logits.dtype == np.float32
        worst = max(worst, worst_error(logits, interpreter.step(feeds)))
    return worst


@pytest.mark.parametrize(
    ("name", "precision", "packed"), [("llama", "bfloat16", 1), ("qwen2", "float16", 1), ("qwen3", "float16", 0)]
)
def test_the_hosted_graph_computes_what_the_serving_graph_does(
    store: Store, tmp_path: Path, name: str, precision: str, packed: int
) -> None:
    """qwen2's head is its embedding: one weight that two nodes read, once as it is and once transposed."""
    graph = store.serving(name)
    half = ll.convert(graph, precision)
    hosted = in_plugin(half, tmp_path)
    assert {n.attrs["packed"] for n in hosted.surgeon.nodes if n.op == "PagedAttention"} == {packed}
    assert error(half, graph, hosted) < (2e-2 if precision == "float16" else 0.15)


def test_what_the_hosted_graph_looks_like(store: Store, tmp_path: Path) -> None:
    hosted = in_plugin(ll.convert(store.serving("mistral"), "float16"), tmp_path)
    pool = [2, "blocks", 2, BLOCK_SIZE, 16]
    step = {
        "input_ids": ["T"],
        "position_ids": ["T"],
        "query_start": ["B+1"],
        "kv_len": ["B"],
        "block_table": ["B", "max_blocks"],
    }
    assert {t.name: t.shape for t in hosted.surgeon.inputs} == {
        **step,
        "slots": ["T"],
        "logits_index": ["N"],
        "kv_cache.0": pool,
        "kv_cache.1": pool,
    }
    wide = {t.name for t in hosted.surgeon.inputs if t.dtype == np.int64}
    assert wide == {"slots"}
    assert {t.name: t.shape for t in hosted.surgeon.outputs} == {
        "logits": ["N", tiny.VOCAB],
        "kv_cache.0.updated": pool,
        "kv_cache.1.updated": pool,
    }
    assert {d.domain for d in hosted.to_onnx().opset_import} == {"", LLMLAB_DOMAIN}
    first, second = (n for n in hosted.surgeon.nodes if n.op == "PagedAttention")
    assert first.attrs["window"] == 6 and first.attrs["rotary"] == 16
    assert all(t.name for t in first.inputs), "no input is omitted"
    assert first.inputs[-2:] == second.inputs[-2:], "the layers share RoPE's tables"


def test_a_wrong_attribute_would_be_seen(store: Store, tmp_path: Path) -> None:
    graph = store.serving("mistral")
    half = ll.convert(graph, "float16")
    hosted = in_plugin(half, tmp_path)
    for node in (n for n in hosted.surgeon.nodes if n.op == "PagedAttention"):
        node.attrs["window"] += 1
    assert error(half, graph, hosted) > 0.1
