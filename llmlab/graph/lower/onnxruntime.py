"""The serving graph for ONNX Runtime's CPU: GroupQueryAttention over slots, products with weights as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, producer, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.lower.gated import expand_gated
from llmlab.graph.lower.onnxruntime_attention import AttentionLowering
from llmlab.graph.lower.onnxruntime_int8 import lower_int8
from llmlab.graph.lower.onnxruntime_moe import lower_experts
from llmlab.graph.lower.onnxruntime_nbits import lower_weight_only
from llmlab.graph.lower.onnxruntime_norms import fuse_residual_norms
from llmlab.graph.lower.onnxruntime_products import lower_products, split_products
from llmlab.graph.lower.onnxruntime_quantized import join_quantized
from llmlab.graph.lower.rounded import round_in_float32
from llmlab.graph.lower.weights import defer_weights
from llmlab.graph.operators.functions import record_implementation

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)

LOWERED_INPUTS = (
    "input_ids",
    "position_ids",
    "logits_index",
    "unpack_index",
    "pack_index",
    "seqlens_k",
    "query_seqlens",
)


def lower(graph: Graph, capacity: int, *, accuracy_level: int = 1, max_tokens: int | None = None) -> Graph:
    """The serving graph, or a piece of it, rewritten for ONNX Runtime's CPU and slots of `capacity` tokens; the given graph
    is not changed.

    Attention runs over R slots of up to S new tokens each, so its inputs are unpacked and its result packed again:
    `unpack_index` i64 [R, S] (row of the step that lies there; any where none does), `pack_index` i64 [T] (row · S +
    offset), `seqlens_k` i32 [R] (keys after the step, minus one), `query_seqlens` i32 [R] (new tokens, 0 for an idle
    slot). Each KV pool becomes `past_key.i` and `past_value.i`
    [R, kv_heads, capacity, channels] (`cache_layout`), to be bound to the same memory as `present_key.i` and `present_value.i`.

    What computes in float16 or bfloat16 does so in float32 here, each result rounded to that type (`lower/rounded.py`).

    accuracy_level: of products whose weights alone are quantized: 1 computes in float32, 4 rounds activations to int8 by blocks.
    max_tokens: most new tokens of a step. Where their scores are few, attention keeps them in memory, and the keys in the slots may be
        multiplied by a constant. Without it, attention goes by tiles, and the slots hold keys as the model has them.
    """
    result = graph.copy()
    edit = Editor(result)
    surgeon = edit.surgeon
    round_in_float32(edit)
    attention = [n for n in surgeon.nodes if n.op == "PagedAttention"]
    replaced = {id(t) for n in attention for t in n.inputs[3:7]}  # pools, query_start, kv_len, block_table
    updated = {id(n.outputs[1]) for n in attention}
    indices = {
        "unpack_index": gs.Variable("unpack_index", _INT64, ["R", "S"]),
        "pack_index": gs.Variable("pack_index", _INT64, ["T"]),
        "seqlens_k": gs.Variable("seqlens_k", _INT32, ["R"]),
        "query_seqlens": gs.Variable("query_seqlens", _INT32, ["R"]),
    }
    surgeon.inputs = [t for t in surgeon.inputs if id(t) not in replaced]
    surgeon.inputs += indices.values() if attention else ()
    surgeon.outputs = [t for t in surgeon.outputs if id(t) not in updated]
    positions = {t.name: t for t in surgeon.inputs if t.name == "position_ids"}
    lowering = AttentionLowering(edit, indices | positions, capacity, max_tokens)
    packed = [lowering.packed_qkv(node) for node in attention]
    for layer, (node, qkv) in enumerate(zip(attention, packed, strict=True)):
        lowering.lower(node, qkv, layer)
    expand_gated(edit)
    sort_nodes(surgeon.cleanup())
    split_products(edit, {id(producer(qkv)) for qkv in packed if qkv is not None})
    join_quantized(edit)
    lower_int8(edit)
    lower_weight_only(edit, accuracy_level)
    lower_products(edit)
    lower_experts(edit)
    sort_nodes(surgeon.cleanup())
    fuse_residual_norms(edit)
    sort_nodes(surgeon.cleanup())
    surgeon.inputs = [t for t in surgeon.inputs if t.outputs or t.name != "position_ids"]
    record_implementation(surgeon, "onnx")
    defer_weights(surgeon)
    sort_nodes(surgeon)
    return result


@dataclass(frozen=True)
class CacheLayout:
    """The KV cache that a lowered graph wants."""

    dtype: str
    """float32, int8, or int4 with two numbers in a byte."""
    rounding: str
    """What its numbers are rounded to: `dtype`, or a narrower type that ONNX Runtime's attention can't hold."""
    layers: tuple[tuple[int, int], ...]
    """(kv_heads, numbers of a head) of each layer's slots."""


def cache_layout(graph: Graph, lowered: Graph) -> CacheLayout:
    """The KV cache of `lowered`, which `lower` made of `graph`. Raises InputError where layers have caches of several types."""
    given = {layer.dtype.name for layer in graph.kv_layers()}
    if len(given) > 1:
        raise InputError(f"the layers' KV caches are {', '.join(sorted(given))}: expected one type for all of them")
    (rounding,) = given
    keys = [t for t in lowered.surgeon.inputs if t.name.startswith("past_key.")]
    dtype = "int4" if keys[0].dtype == np.uint8 else np.dtype(keys[0].dtype).name
    numbers = 2 if dtype == "int4" else 1
    return CacheLayout(dtype, rounding, tuple((t.shape[1], numbers * t.shape[3]) for t in keys))
