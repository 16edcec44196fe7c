"""Attention → PagedAttention, the fused attention/KV-cache plugin node, with RoPE inside."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Dim, Editor, operand, producer, scope
from llmlab.graph.graph import LLMLAB_DOMAIN, TOKENS
from llmlab.graph.passes.fuse_attention import SINKS
from llmlab.graph.passes.recognise_mask import ALIBI_SLOPES, WINDOW
from llmlab.graph.rewrite import Match, Pass

_METADATA = ("query_start", "kv_len", "block_table", "position_ids")


class PageAttention(Pass):
    """Causal Attention over padded tokens → PagedAttention over packed tokens and a pool of KV blocks."""

    name = "page_attention"

    def pattern(self, node: gs.Node) -> Match | None:
        return Match(node=node) if node.op == "Attention" else None

    def check(self, edit: Editor, match: Match) -> str | None:
        node = match.node
        if operand(node, 3) is not None:
            return "its mask was not recognised"
        if not node.attrs.get("is_causal"):
            return "it is not causal: every token sees every other"
        if any(operand(node, i) is not None for i in range(4, SINKS)) or len(node.outputs) > 1:
            return "it has a KV cache of its own already"
        if node.attrs.get("qk_matmul_output_mode", 0):
            return "its scores are an output"
        shapes = [t.shape for t in node.inputs[:3]]
        if any(s is None or len(s) != 4 for s in shapes):
            return f"q, k, v have shapes {shapes}, expected [batch, heads, sequence, head_dim]"
        (_, heads, _, dim), (_, kv_heads, _, k_dim), (_, v_heads, _, v_dim) = shapes
        if (
            not all(isinstance(n, int) for n in (heads, kv_heads, dim))
            or dim != k_dim
            or not isinstance(v_dim, int)
            or kv_heads != v_heads
        ):
            return f"q, k, v have shapes {shapes}; heads and head_dim must be known, and fit"
        if heads % kv_heads:
            return f"{heads} query heads don't divide into {kv_heads} KV heads"
        if not {t.name for t in edit.surgeon.inputs}.issuperset(_METADATA):
            return "the tokens are not packed"
        match.heads, match.kv_heads, match.v_dim, match.dim = heads, kv_heads, v_dim, max(dim, v_dim)
        match.scale = float(node.attrs.get("scale") or 1 / math.sqrt(dim))
        match.rope = _shared_rope(node, dim)
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        node, surgeon, where = match.node, edit.surgeon, scope(match.node)
        layer = sum(n.op == "PagedAttention" for n in surgeon.nodes)
        dtype = node.inputs[0].dtype or np.dtype(np.float32)
        q, k, v = node.inputs[:3]
        cos = sin = None
        if match.rope is not None:
            cos, sin = match.rope.inputs[1:3]
            q, k = (rotated.inputs[0].inputs[0] for rotated in (q, k))
        rows = [_rows(edit, where, t, match.dim) for t in (q, k, v)]
        shape: list[Dim] = [2, "blocks", match.kv_heads, "block_size", match.dim]
        cache = gs.Variable(edit.name(f"kv_cache.{layer}"), dtype, shape)
        surgeon.inputs.append(cache)
        metadata = {t.name: t for t in surgeon.inputs}
        attrs = {
            "num_heads": match.heads,
            "kv_num_heads": match.kv_heads,
            "head_dim": match.dim,
            "scale": match.scale,
            "window": int(node.attrs.get(WINDOW, 0)),
            "softcap": float(node.attrs.get("softcap", 0.0)),
            "interleaved": int(match.rope.attrs.get("interleaved", 0)) if match.rope is not None else 0,
        }
        out, updated = edit.add_many(
            "PagedAttention",
            where,
            [
                *rows,
                cache,
                *(metadata[n] for n in _METADATA),
                cos,
                sin,
                operand(node, ALIBI_SLOPES),
                operand(node, SINKS),
            ],
            attrs,
            [(dtype, [TOKENS, match.heads * match.dim]), (dtype, shape)],
            domain=LLMLAB_DOMAIN,
        )
        updated.name = edit.name(f"{cache.name}.updated")
        surgeon.outputs.append(updated)
        target = edit.constant(f"{where}/heads", np.array([0, match.heads, match.dim], np.int64))
        by_head = edit.add("Reshape", where, [out, target], dtype=dtype, shape=[TOKENS, match.heads, match.dim])
        if match.v_dim != match.dim:
            bounds = [edit.constant(f"{where}/v_dim", np.array([n], np.int64)) for n in (0, match.v_dim, 2)]
            by_head = edit.add(
                "Slice", where, [by_head, *bounds], dtype=dtype, shape=[TOKENS, match.heads, match.v_dim]
            )
        axis = edit.constant("batch_axis", np.array([0], np.int64))
        split = edit.add("Unsqueeze", where, [by_head, axis], dtype=dtype, shape=[1, *by_head.shape])
        back = edit.add(
            "Transpose",
            where,
            [split],
            {"perm": [0, 2, 1, 3]},
            dtype=dtype,
            shape=[1, match.heads, TOKENS, match.v_dim],
        )
        edit.replace(node.outputs[0], back)


def _shared_rope(node: gs.Node, dim: int) -> gs.Node | None:
    """The RoPE that q and k share, if the plugin node can do it: one table, the step's own positions, the first channels."""
    of_q, of_k = (producer(t, "RotaryEmbedding") for t in node.inputs[:2])
    if of_q is None or of_k is None or len(of_q.inputs) != 4 or len(of_k.inputs) != 4:
        return None
    if not all(a is b for a, b in zip(of_q.inputs[1:], of_k.inputs[1:], strict=True)):
        return None
    (turned, order), other = (
        (n.attrs.get("rotary_embedding_dim", 0), n.attrs.get("interleaved", 0)) for n in (of_q, of_k)
    )
    width = (turned or dim) // 2
    tables = [t for t in of_q.inputs[1:3] if isinstance(t, gs.Constant) and list(t.shape)[1:] == [width]]
    row = producer(of_q.inputs[3], "Unsqueeze")
    own = row is not None and row.inputs[0].name == "position_ids" and not row.inputs[0].inputs
    return of_q if len(tables) == 2 and own and other == (turned, order) else None


def _rows(edit: Editor, where: str, tensor: gs.Tensor, width: int) -> gs.Variable:
    """[1, heads, T, dim] → [T, heads · width]; v and q, k may have heads of two sizes, and the smaller are filled with zeros."""
    _, heads, tokens, dim = tensor.shape
    by_token = edit.add(
        "Transpose", where, [tensor], {"perm": [0, 2, 1, 3]}, dtype=tensor.dtype, shape=[1, tokens, heads, dim]
    )
    axis = edit.constant("batch_axis", np.array([0], np.int64))
    flat = edit.add("Squeeze", where, [by_token, axis], dtype=tensor.dtype, shape=[tokens, heads, dim])
    if dim != width:
        edge = edit.constant(f"{where}/edge", np.array([0, 0, 0, 0, 0, width - dim], np.int64))
        flat = edit.add("Pad", where, [flat, edge], dtype=tensor.dtype, shape=[tokens, heads, width])
    target = edit.constant(f"{where}/rows", np.array([0, heads * width], np.int64))
    return edit.add("Reshape", where, [flat, target], dtype=tensor.dtype, shape=[tokens, heads * width])
