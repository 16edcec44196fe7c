"""Serving graphs of one PagedAttention in all its forms, and what its definition in NumPy says of ragged steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import steps
from steps import Plan, worst_error

from llmlab.config import ModelConfig
from llmlab.graph.graph import LLMLAB_DOMAIN, OPSET, Graph
from llmlab.graph.interpret import Interpreter
from llmlab.quant.kv_scales import CACHES, Scales, place_scales, scale_of

VOCAB = 40
# Every step has a decode, a chunk, a prompt's start or one token alone; slots between the sequences stay idle.
PLAN = Plan(((9, 1, 1, 1), (1, 1, 0, 1), (0, 4, 1, 7), (0, 12, 5, 1)))
CONFIG = ModelConfig("toy", VOCAB, hidden_size=8, num_layers=1, num_heads=2, max_position_embeddings=64, raw={
    "model_type": "toy", "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
})  # fmt: skip


def serving(
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    rotary: int = 0,
    alibi: bool = False,
    sinks: bool = False,
    **attrs: Any,
) -> Graph:
    """A serving graph of one PagedAttention whose q, k and v are looked up by token; its result is the logits."""
    rng = np.random.default_rng(heads * 100 + kv_heads * 10 + dim)
    f32 = np.dtype(np.float32)
    inputs = {
        "input_ids": (np.int64, ["T"]),
        "position_ids": (np.int64, ["T"]),
        "query_start": (np.int32, ["B+1"]),
        "kv_len": (np.int32, ["B"]),
        "block_table": (np.int32, ["B", "max_blocks"]),
        "logits_index": (np.int64, ["N"]),
        "kv_cache.0": (np.float32, [2, "blocks", kv_heads, "block_size", dim]),
    }
    named = {name: gs.Variable(name, np.dtype(dtype), shape) for name, (dtype, shape) in inputs.items()}
    nodes, rows = [], []
    for what, width in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
        table = gs.Constant(f"{what}.table", rng.standard_normal((VOCAB, width)).astype(np.float32))
        rows.append(gs.Variable(what, f32, ["T", width]))
        nodes.append(gs.Node("Gather", f"m/{what}", {"axis": 0}, [table, named["input_ids"]], [rows[-1]]))
    extra: list[gs.Tensor] = [gs.Variable.empty()] * 4
    if rotary:
        angles = np.outer(np.arange(64), 0.5 ** np.arange(rotary // 2))
        extra[0] = gs.Constant("cos", np.cos(angles).astype(np.float32))
        extra[1] = gs.Constant("sin", np.sin(angles).astype(np.float32))
    if alibi:
        extra[2] = gs.Constant("slopes", (0.5 ** np.arange(1, heads + 1)).astype(np.float32))
    if sinks:
        extra[3] = gs.Constant("sinks", rng.standard_normal(heads).astype(np.float32) + 1)
    while extra and isinstance(extra[-1], gs.Variable):
        extra.pop()
    out = gs.Variable("out", f32, ["T", heads * dim])
    updated = gs.Variable("kv_cache.0.updated", f32, named["kv_cache.0"].shape)
    logits = gs.Variable("logits", f32, ["N", heads * dim])
    given = {"scale": 0.3, "window": 0, "softcap": 0.0, "interleaved": 0} | attrs
    sizes = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": dim}
    metadata = [named[n] for n in ("query_start", "kv_len", "block_table", "position_ids")]
    nodes += [
        gs.Node("PagedAttention", "m/PagedAttention", sizes | given,
                [*rows, named["kv_cache.0"], *metadata, *extra], [out, updated], domain=LLMLAB_DOMAIN),
        gs.Node("Gather", "m/logits", {"axis": 0}, [out, named["logits_index"]], [logits]),
    ]  # fmt: skip
    return Graph(gs.Graph(nodes, list(named.values()), [logits, updated], opset=OPSET), CONFIG)


def reference(graph: Graph, plan: Plan = PLAN) -> list[np.ndarray]:
    interpreter = Interpreter(graph, num_blocks=60, block_size=4)
    tables = steps.paged_tables(plan, 4, 60)
    return [interpreter.step(steps.feeds(b)) for b, _ in steps.batches(plan, VOCAB, tables, steps.all_rows)]


def worst(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(worst_error(a, b) for a, b in zip(found, expected, strict=True))


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kv head": {"kv_heads": 1},
    "as many kv heads": {"kv_heads": 4},
    "rope": {"rotary": 16},
    "interleaved": {"rotary": 16, "interleaved": 1},
    "partial": {"dim": 80, "rotary": 32},
    "interleaved, partial": {"dim": 64, "rotary": 48, "interleaved": 1},
    "small partial": {"rotary": 8},  # from here on RoPE is a node in front
    "few channels turn": {"rotary": 4, "interleaved": 1},
    "head of 8, rope": {"dim": 8, "rotary": 8},
    "head of 24, rope": {"dim": 24, "rotary": 24},
    "head of 24, interleaved, partial": {"dim": 24, "rotary": 6, "interleaved": 1},
    "odd head": {"dim": 10},
    "odd head, rope": {"dim": 14, "rotary": 14, "window": 3},
    "window": {"window": 3},
    "window of itself": {"window": 1},
    "softcap": {"softcap": 2.0},
    "softcap, window": {"softcap": 2.0, "window": 3},
    "sinks": {"sinks": True},
    "sinks, window, softcap, rope": {"sinks": True, "window": 3, "softcap": 2.0, "rotary": 16},
    "alibi": {"alibi": True, "kv_heads": 4},
    "alibi, odd head": {"alibi": True, "dim": 15, "kv_heads": 1},
    "alibi, rope, window": {"alibi": True, "dim": 24, "rotary": 16, "window": 5},
}
LARGE: dict[str, dict[str, Any]] = {
    f"head of {dim}": {"dim": dim, "rotary": dim, "kv_heads": kv_heads, "interleaved": interleaved}
    for dim, kv_heads, interleaved in ((64, 2, 0), (96, 4, 1), (128, 1, 0), (256, 2, 0))
} | {f"alibi, head of {dim}": {"alibi": True, "dim": dim, "kv_heads": 4} for dim in (64, 80, 96, 128)}


def form(options: dict[str, Any]) -> Graph:
    return serving(4, options.get("kv_heads", 2), options.get("dim", 16), **{
        name: value for name, value in options.items() if name not in ("kv_heads", "dim")
    })  # fmt: skip


def quantized(options: dict[str, Any], cache: str, per: str, louder: float = 1.0) -> Graph:
    """A form with a cache of some scales; keys' are `louder` times as large."""
    graph = form(options)
    (layer,) = graph.kv_layers()
    rng = np.random.default_rng(0)
    absmax = rng.uniform(1.5, 2.5, (2, layer.kv_heads * layer.head_dim)).astype(np.float32)
    k, v = (scale_of(most, CACHES[cache], per, layer.kv_heads) for most in absmax)
    place_scales(graph, CACHES[cache], [Scales(k * np.float32(louder), v)])
    return graph
