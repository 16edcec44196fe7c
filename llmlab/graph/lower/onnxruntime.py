"""The serving graph for ONNX Runtime's CPU: GroupQueryAttention over slots, products with weights as they are stored."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, ints, operand, other, producer, scope
from llmlab.graph.graph import Graph
from llmlab.graph.lower.onnxruntime_attention import AttentionLowering
from llmlab.graph.lower.weights import defer_weights
from llmlab.graph.passes.merge_products import linear

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


def lower(graph: Graph, capacity: int) -> Graph:
    """The serving graph rewritten for ONNX Runtime's CPU and slots of `capacity` tokens; the given graph is not changed.

    Attention runs over R slots of up to S new tokens each, so its inputs are unpacked and its result packed again:
    `unpack_index` i64 [R, S] (row of the step that lies there; any where none does), `pack_index` i64 [T] (row · S +
    offset), `seqlens_k` i32 [R] (keys after the step, minus one), `query_seqlens` i32 [R] (new tokens, 0 for an idle
    slot). Each KV pool becomes `past_key.i` and `past_value.i`
    [R, kv_heads, capacity, channels] (`kv_layers`), to be bound to the same memory as `present_key.i` and `present_value.i`.
    """
    result = graph.copy()
    edit = Editor(result)
    surgeon = edit.surgeon
    named = {t.name: t for t in surgeon.inputs}
    indices = {
        "unpack_index": gs.Variable("unpack_index", _INT64, ["R", "S"]),
        "pack_index": gs.Variable("pack_index", _INT64, ["T"]),
        "seqlens_k": gs.Variable("seqlens_k", _INT32, ["R"]),
        "query_seqlens": gs.Variable("query_seqlens", _INT32, ["R"]),
    }
    surgeon.inputs = [named["input_ids"], named["position_ids"], named["logits_index"], *indices.values()]
    surgeon.outputs = [t for t in surgeon.outputs if t.name == "logits"]
    attention = [n for n in surgeon.nodes if n.op == "PagedAttention"]
    lowering = AttentionLowering(edit, indices | {"position_ids": named["position_ids"]}, capacity)
    packed = [lowering.packed_qkv(node) for node in attention]
    for layer, (node, qkv) in enumerate(zip(attention, packed, strict=True)):
        lowering.lower(node, qkv, layer)
    surgeon.cleanup().toposort()
    _split_products(edit, {id(producer(qkv)) for qkv in packed if qkv is not None})
    _lower_products(edit)
    surgeon.cleanup().toposort()
    if not named["position_ids"].outputs:
        surgeon.inputs = [t for t in surgeon.inputs if t.name != "position_ids"]
    defer_weights(surgeon)
    surgeon.toposort()
    return result


def kv_layers(lowered: Graph) -> tuple[tuple[int, int], ...]:
    """(kv_heads, channels of a head) of each layer's slots, as the lowered graph wants them."""
    return tuple((t.shape[1], t.shape[3]) for t in lowered.surgeon.inputs if t.name.startswith("past_key."))


def _split_products(edit: Editor, keep: set[int]) -> None:
    """Undo merged products whose Split survives: apart they are as fast here, and the Split copies."""
    for node in list(edit.surgeon.nodes):
        product = producer(node.inputs[0], "MatMul", "Add") if node.op == "Split" else None
        if product is None or id(product) in keep or len(product.outputs[0].outputs) != 1:
            continue
        bias = None
        if product.op == "Add":
            bias = next((producer(t, "Concat") for t in product.inputs if constant_expression(t)), None)
            product = next((p for t in product.inputs if (p := producer(t, "MatMul"))), None)
        layer = linear(product) if product is not None else None
        joined = producer(layer.weight, "Concat") if layer is not None else None
        if product is None or layer is None or joined is None or (layer.bias is not None and bias is None):
            continue
        if ints(operand(node, 1)) != [int(t.shape[0]) for t in joined.inputs]:
            continue
        where = scope(node)
        for i, (weight, old) in enumerate(zip(joined.inputs, list(node.outputs), strict=True)):
            width, depth = weight.shape
            turned = edit.add("Transpose", where, [weight], {"perm": [1, 0]}, dtype=weight.dtype, shape=[depth, width])
            part = edit.add("MatMul", where, [product.inputs[0], turned], dtype=old.dtype, shape=old.shape)
            if bias is not None:
                part = edit.add("Add", where, [part, bias.inputs[i]], dtype=old.dtype, shape=old.shape)
            edit.replace(old, part)
    edit.surgeon.cleanup().toposort()


def _lower_products(edit: Editor) -> None:
    """x @ Wᵀ (+ bias or residual) → Gemm, which reads W [N, K] as the checkpoint stores it and adds for free."""
    for node in list(edit.surgeon.nodes):
        layer = linear(node)
        x = node.inputs[0] if layer is not None else None
        if (
            layer is None
            or x is None
            or len(x.shape or ()) != 2
            or (edit.is_output(node.outputs[0]) and layer.bias is not None)
        ):
            continue
        addend, out = layer.bias, layer.out
        if addend is None and len(out.outputs) == 1 and out.outputs[0].op == "Add" and not edit.is_output(out):
            add = out.outputs[0]
            residual = other(add, out)
            if residual is not out and list(residual.shape or ()) == list(out.shape or ()):
                addend, out = residual, add.outputs[0]
        fused = edit.add(
            "Gemm", scope(node), [x, layer.weight, addend], {"transB": 1}, dtype=out.dtype, shape=out.shape
        )
        edit.replace(out, fused)
