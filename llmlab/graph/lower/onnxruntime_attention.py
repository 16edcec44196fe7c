"""PagedAttention → GroupQueryAttention of ONNX Runtime's CPU, which does in-flight batching over slots.

It takes window, softcap, sinks and most RoPE as they are. What it lacks is brought into a form that it has: RoPE of other
sizes becomes a node in front of it, odd heads are filled up with zeros, and ALiBi becomes more channels of each head.

The operator has two ways to compute: by tiles, or with all scores of a step in memory. Of one new token the second is a quarter faster,
at any length, if its scale is 1: only then does ONNX Runtime multiply the query by the keys as they lie, without packing them first. So
where the scores are few and all channels turn, the scale moves into the tables of RoPE, its root each for queries and keys, and a sink
that attracts nothing (a logit of minus infinity) keeps the operator from its tiles. Keys in int8 or int4 are never packed: there the scale stays.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.edit import Editor, operand, producer, scope, value
from llmlab.graph.graph import KVLayer
from llmlab.graph.lower.onnxruntime_cache import SlotCache

_DOMAIN = "com.microsoft"
_ROTARY_STEP = 16  # and of this where the operator turns them itself; the channels that turn do as well
_ALIBI_SLOPES, _SINKS = 10, 11  # inputs of PagedAttention
_HEAD_SINK, _QUERY_SEQLENS = 11, 16  # inputs of GroupQueryAttention: a logit per head, new tokens of each row
_F32 = np.dtype(np.float32)
_MOST_SCORES = 1 << 25
"""Scores of a layer that may be in memory at once: 128 MiB."""


class AttentionLowering:
    """Lowers the PagedAttention nodes of one graph, in order; they share indices and tables.

    indices: `unpack_index`, `pack_index`, `seqlens_k`, `query_seqlens` and `position_ids`, as `lower` describes them.
    max_tokens: most new tokens of a step; without it attention goes by tiles.
    """

    def __init__(self, edit: Editor, indices: dict[str, gs.Variable], capacity: int, max_tokens: int | None) -> None:
        self._edit = edit
        self._indices = indices
        self._capacity = capacity
        self._max_tokens = max_tokens
        self._total = edit.constant("slot_capacity", np.array(capacity, np.int32))
        self._tables: dict[tuple[int, float], gs.Constant] = {}

    def packed_qkv(self, node: gs.Node) -> gs.Tensor | None:
        """The tensor [T, (heads + 2 · kv_heads) · dim] that the operator can read whole: q, k and v are a Split of it, which
        nothing else reads, and they go in as they are."""
        split = producer(node.inputs[0], "Split")
        if split is None or [id(t) for t in split.outputs] != [id(t) for t in node.inputs[:3]]:
            return None
        cache = self._cache(node)
        if cache.rounds or cache.width != node.attrs["head_dim"]:
            return None
        if not (_turns_inside(node, cache.width) or operand(node, 8) is None):
            return None
        return split.inputs[0] if all(len(t.outputs) == 1 for t in split.outputs) else None

    def lower(self, node: gs.Node, qkv: gs.Tensor | None, layer: int) -> None:
        """Replace `node`, with q, k and v in one where `packed_qkv` found them, and its KV pool by that of `layer`."""
        edit, where, attrs = self._edit, scope(node), node.attrs
        cache = self._cache(node)
        heads, kv_heads, dim, width = attrs["num_heads"], attrs["kv_num_heads"], attrs["head_dim"], cache.width
        dtype = np.dtype(node.inputs[0].dtype)
        if operand(node, _ALIBI_SLOPES) is not None and (attrs["softcap"] or operand(node, _SINKS) is not None):
            raise UnsupportedModelError(
                f"{node.name}: ALiBi beside a softcap or sinks, which ONNX Runtime's attention can't do"
            )
        turns = _turns_inside(node, width) and not cache.rounds
        rows = [qkv] if qkv is not None else self._shaped(node, turns, cache)
        unpacked: list[gs.Tensor | None] = [
            edit.add(
                "Gather",
                where,
                [t, self._indices["unpack_index"]],
                {"axis": 0},
                dtype=dtype,
                shape=["R", "S", t.shape[-1]],
            )
            for t in rows
        ]
        unpacked += [None] * (3 - len(unpacked))
        cache_shape = ["R", kv_heads, self._capacity, cache.channels]
        past = [gs.Variable(f"past_{what}.{layer}", cache.held, cache_shape) for what in ("key", "value")]
        edit.surgeon.inputs.extend(past)
        scale, sinks, root = attrs["scale"], operand(node, _SINKS), 1.0
        if self._whole(node, turns, cache):
            if sinks is None:
                sinks = edit.constant(f"{where}/no_sink", np.full(heads, -np.inf, np.float32))
            if cache.dtype == "float32":
                root, scale = float(np.sqrt(scale)), 1.0
        cos, sin = (self._by_slot(operand(node, i), root) if turns else None for i in (8, 9))
        inputs = [*unpacked, *past, self._indices["seqlens_k"], self._total, cos, sin]
        inputs += [None] * (_HEAD_SINK - len(inputs)) + [sinks, *cache.scales()]
        inputs += [None] * (_QUERY_SEQLENS - len(inputs)) + [self._indices["query_seqlens"]]
        options = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": scale,
            "do_rotary": int(turns),
            "rotary_interleaved": attrs["interleaved"] if turns else 0,
            "local_window_size": attrs["window"] or -1,
            "softcap": attrs["softcap"],
            **cache.attributes(),
        }
        out, *present = edit.add_many(
            "GroupQueryAttention",
            where,
            inputs,
            options,
            [(dtype, ["R", "S", heads * width]), (cache.held, cache_shape), (cache.held, cache_shape)],
            domain=_DOMAIN,
        )
        for what, tensor in zip(("key", "value"), present, strict=True):
            tensor.name = f"present_{what}.{layer}"
        edit.surgeon.outputs.extend(present)
        flat = self._reshape(where, out, [-1, heads * width])
        packed = edit.add(
            "Gather",
            where,
            [flat, self._indices["pack_index"]],
            {"axis": 0},
            dtype=dtype,
            shape=["T", heads * width],
        )
        edit.replace(node.outputs[0], self._cut(where, packed, heads, width, dim))
        node.outputs.clear()

    def _cache(self, node: gs.Node) -> SlotCache:
        return SlotCache(self._edit, node, KVLayer.of(node), self._capacity, operand(node, _ALIBI_SLOPES) is not None)

    def _whole(self, node: gs.Node, turns: bool, cache: SlotCache) -> bool:
        """Whether the operator is to have all scores of a step in memory: where they are few and, for keys in float32, the tables of RoPE can
        hold the scale."""
        attrs = node.attrs
        if self._max_tokens is None or attrs["num_heads"] * self._max_tokens * self._capacity > _MOST_SCORES:
            return False
        every = turns and 2 * int(node.inputs[8].shape[1]) == cache.width
        return cache.dtype != "float32" or (every and attrs["scale"] > 0)

    def _shaped(self, node: gs.Node, turns: bool, cache: SlotCache) -> list[gs.Tensor]:
        """q, k, v [T, heads · width], turned unless the operator does it, with zeros and ALiBi's channels behind each head; k and
        v are rounded where the operator can't.

        The bias slope · (key − query) is, up to a constant for each query, which a softmax without a sink doesn't see, the
        product of one channel: slope / scale in q, the key's position in k, nothing in v. Where a cache holds small integers, the
        position lies there in digits, a channel each, and q has slope / scale times what the digit counts.
        """
        attrs, where, dim, width = node.attrs, scope(node), node.attrs["head_dim"], cache.width
        rows: list[gs.Tensor] = list(node.inputs[:3])
        heads = [attrs["num_heads"], attrs["kv_num_heads"], attrs["kv_num_heads"]]
        if operand(node, 8) is not None and not turns:
            rows[:2] = [self._turned(node, t, n) for t, n in zip(rows[:2], heads[:2], strict=True)]
        rows = cache.rounded(rows)
        if width == dim:
            return rows
        split = [self._reshape(where, t, [0, n, dim]) for t, n in zip(rows, heads, strict=True)]
        edge = self._edit.constant(f"{where}/edge", np.array([0, 0, 0, 0, 0, width - dim], np.int64))
        wide: list[gs.Tensor] = [
            self._edit.add("Pad", where, [t, edge], dtype=_F32, shape=["T", n, width])
            for t, n in zip(split, heads, strict=True)
        ]
        slopes = value(operand(node, _ALIBI_SLOPES))
        if slopes is not None:
            places = cache.places
            weights = np.zeros((1, attrs["num_heads"], width), np.float32)
            weights[..., dim : dim + len(places)] = (
                slopes.astype(np.float32).reshape(1, -1, 1) / attrs["scale"] * places
            )
            of_query = self._edit.constant(f"{where}/slope_channels", weights)
            placed = self._positions(where, dim, cache)
            for i, extra in enumerate((of_query, placed)):
                wide[i] = self._edit.add("Add", where, [wide[i], extra], dtype=_F32, shape=["T", heads[i], width])
        return [self._reshape(where, t, [0, n * width]) for t, n in zip(wide, heads, strict=True)]

    def _positions(self, where: str, dim: int, cache: SlotCache) -> gs.Variable:
        """Keys' positions [T, 1, width] in the channels behind `dim`: one number, or digits where a cache's numbers are small."""
        positions, width = self._indices["position_ids"], cache.width
        if len(cache.places) == 1:
            wide = self._edit.add("Cast", where, [positions], {"to": 1}, dtype=_F32, shape=["T"])
            column = self._reshape(where, wide, [-1, 1, 1])
            channel = np.zeros((1, 1, width), np.float32)
            channel[..., dim] = 1
            of_key = self._edit.constant(f"{where}/position_channel", channel)
            return self._edit.add("Mul", where, [column, of_key], dtype=_F32, shape=["T", 1, width])
        table = np.zeros((self._capacity, 1, width), np.float32)
        table[:, 0, dim : dim + len(cache.places)] = (
            np.arange(self._capacity)[:, None] // np.array(cache.places, int) % int(cache.places[1])
        )
        given = self._edit.constant(f"{where}/position_digits", table)
        return self._edit.add("Gather", where, [given, positions], {"axis": 0}, dtype=_F32, shape=["T", 1, width])

    def _turned(self, node: gs.Node, rows: gs.Tensor, heads: int) -> gs.Tensor:
        """RoPE of rows [T, heads · dim] as a node of its own."""
        edit, where = self._edit, scope(node)
        cos, sin = (self._by_slot(table) for table in node.inputs[8:10])  # the operator wants as many rows as tokens
        assert cos is not None and sin is not None
        axis = edit.constant("batch_axis", np.array([0], np.int64))
        batch = edit.add("Unsqueeze", where, [rows, axis], dtype=_F32, shape=[1, *rows.shape])
        positions = self._indices["position_ids"]
        row = edit.add("Unsqueeze", where, [positions, axis], dtype=positions.dtype, shape=[1, "T"])
        options = {
            "interleaved": node.attrs["interleaved"],
            "num_heads": heads,
            "rotary_embedding_dim": 2 * int(cos.shape[1]),
        }
        turned = edit.add("RotaryEmbedding", where, [batch, cos, sin, row], options, dtype=_F32, shape=batch.shape)
        return edit.add("Squeeze", where, [turned, axis], dtype=_F32, shape=rows.shape)

    def _cut(self, where: str, packed: gs.Tensor, heads: int, width: int, dim: int) -> gs.Tensor:
        """[T, heads · width] → [T, heads · dim]: the channels that were added go."""
        if width == dim:
            return packed
        split = self._reshape(where, packed, [0, heads, width])
        bounds = [self._edit.constant(f"{where}/cut", np.array([n], np.int64)) for n in (0, dim, 2)]
        short = self._edit.add("Slice", where, [split, *bounds], dtype=_F32, shape=["T", heads, dim])
        return self._reshape(where, short, [0, heads * dim])

    def _by_slot(self, table: gs.Tensor | None, factor: float = 1.0) -> gs.Tensor | None:
        """cos or sin, times `factor`, with a row for every place in a slot: the operator wants as many, though none beyond the
        model's longest sequence is ever read."""
        if table is None:
            return None
        key = id(table), factor
        if key not in self._tables:
            rows = np.asarray(value(table, limit=1 << 31))
            missing = max(0, self._capacity - len(rows))
            padded = np.pad(rows, ((0, missing), (0, 0)), mode="edge")[: self._capacity]
            scaled = padded if factor == 1 else (padded * np.float64(factor)).astype(padded.dtype)
            self._tables[key] = self._edit.constant(table.name, scaled)
        return self._tables[key]

    def _reshape(self, where: str, tensor: gs.Tensor, target: list[int]) -> gs.Variable:
        sizes = self._edit.constant(f"{where}/sizes", np.asarray(target, np.int64))
        shape = ["T" if size == 0 else None if size == -1 else size for size in target]
        return self._edit.add("Reshape", where, [tensor, sizes], dtype=tensor.dtype, shape=shape)


def _turns_inside(node: gs.Node, width: int) -> bool:
    """Whether the operator, with heads of `width` channels, can do the node's RoPE."""
    cos = operand(node, 8)
    return cos is not None and width % _ROTARY_STEP == 0 and 2 * int(cos.shape[1]) % _ROTARY_STEP == 0
