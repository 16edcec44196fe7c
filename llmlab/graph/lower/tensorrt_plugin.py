"""A lowered graph in one piece, whose PagedAttention nodes a TensorRT plugin runs."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand, sort_nodes
from llmlab.graph.lower.tensorrt_parts import Dense, Lowered, Tensor
from llmlab.graph.lower.views import columns


def plugin_nodes(edit: Editor, block_size: int) -> Lowered:
    """`lower` with plugin hosting, from a graph in operators that TensorRT has; `edit`'s graph is changed.

    TensorRT's parser passes a plugin no omitted input, so attributes say which are there: inputs are `qkv` where
    `packed`, else `q`, `k`, `v`; the pool; `query_start`, `kv_len`, `block_table`, `position_ids`, `slots`; `cos` and `sin`
    where `rotary` (the channels that turn) is not 0; `alibi_slopes` where `alibi`; `sinks` where `sinks`; `k_scale` and `v_scale` where
    `quantized`.
    `slots` i64 [T] says which place of the pool each new token takes, and is an input of the graph.
    """
    surgeon = edit.surgeon
    named = {t.name: t for t in surgeon.inputs}
    slots = gs.Variable("slots", np.dtype(np.int64), ["T"])
    for node in surgeon.nodes:
        if node.op != "PagedAttention":
            continue
        cos, sin, alibi, sinks, k_scale, v_scale = (operand(node, i) for i in range(8, 14))
        qkv = _packed(node)
        heads = [qkv] if qkv is not None else node.inputs[:3]
        pool = node.inputs[3]
        for tensor in (pool, node.outputs[1]):
            tensor.shape = [*tensor.shape[:3], block_size, tensor.shape[4]]
        node.attrs |= {
            "block_size": block_size,
            "rotary": 0 if cos is None else 2 * int(cos.shape[1]),
            "packed": int(qkv is not None),
            "alibi": int(alibi is not None),
            "sinks": int(sinks is not None),
            "quantized": int(k_scale is not None),
        }
        tables = [t for t in (cos, sin, alibi, sinks, k_scale, v_scale) if t is not None]
        node.inputs = [*heads, pool, *node.inputs[4:8], slots, *tables]
    metadata = ("input_ids", "position_ids", "query_start", "kv_len", "block_table")
    pools = [t for t in surgeon.inputs if t.name.startswith("kv_cache.")]
    surgeon.inputs = [*(named[n] for n in metadata), slots, named["logits_index"], *pools]
    sort_nodes(surgeon.cleanup())
    logits = next(t for t in surgeon.outputs if t.name == "logits")
    return Lowered((Dense("model", edit.graph, "model"),), {"logits": Tensor("float32", int(logits.shape[1]), "N")})


def _packed(node: gs.Node) -> gs.Tensor | None:
    """The tensor that is q, k and v side by side and nothing else."""
    attrs = node.attrs
    q, kv = (attrs[heads] * attrs["head_dim"] for heads in ("num_heads", "kv_num_heads"))
    found = [columns(t) for t in node.inputs[:3]]
    whole = found[0].tensor
    same = all(c.tensor is whole for c in found) and [c.offset for c in found] == [0, q, q + kv]
    return whole if same and list(whole.shape)[1:] == [q + 2 * kv] else None
