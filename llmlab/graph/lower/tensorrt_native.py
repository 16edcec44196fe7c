"""A lowered graph whose attention is ONNX's own: RotaryEmbedding, TensorScatter into linear slots, Attention with a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.edit import Editor, operand, scope, sort_nodes
from llmlab.graph.lower.tensorrt_parts import Dense, Lowered, Tensor
from llmlab.graph.store.storage import array, onnx_dtype

NATIVE_OPSET = 24  # the first that has TensorScatter
_WIDE, _INT64, _INT32, _BOOL = (np.dtype(t) for t in (np.float32, np.int64, np.int32, bool))


def native_attention(edit: Editor, capacity: int) -> Lowered:
    """`lower` with native hosting, from a graph in operators that TensorRT has; `edit`'s graph is changed.

    A sequence has a slot of `capacity` tokens, and a step R slots with up to S new tokens each. Inputs beside the serving graph's
    `input_ids`, `position_ids` and `logits_index`: `unpack_index` i32 [R, S] (row of the step that lies there; any where none
    does), `pack_index` i32 [T] (row · S + offset), `write_index` i64 [R] (keys before the step; S more must fit). Each KV
    pool becomes `past_key.i` and `past_value.i` [R, kv_heads, capacity, head_dim], to be bound to the same memory as
    `present_key.i` and `present_value.i`, and finite from the start: a key that isn't seen still counts nothing times its value.
    Raises UnsupportedModelError that names the node for soft-capped scores and for sinks.
    """
    surgeon = edit.surgeon
    attention = [n for n in surgeon.nodes if n.op == "PagedAttention"]
    named = {t.name: t for t in surgeon.inputs}
    surgeon.outputs = [t for t in surgeon.outputs if t.name == "logits"]
    lowering = _Native(edit, capacity, named["position_ids"])
    surgeon.inputs = [named["input_ids"], named["position_ids"], named["logits_index"], *lowering.indices]
    for layer, node in enumerate(attention):
        lowering.lower(node, layer)
    sort_nodes(surgeon.cleanup())
    surgeon.opset = NATIVE_OPSET
    surgeon.import_domains = [onnx.helper.make_opsetid("", NATIVE_OPSET)]
    logits = surgeon.outputs[0]
    return Lowered((Dense("model", edit.graph, "model"),), {"logits": Tensor("float32", int(logits.shape[1]), "N")})


class _Native:
    def __init__(self, edit: Editor, capacity: int, positions: gs.Variable) -> None:
        self._edit, self._capacity, self._positions = edit, capacity, positions
        self._unpack = gs.Variable("unpack_index", _INT32, ["R", "S"])
        self._pack = gs.Variable("pack_index", _INT32, ["T"])
        self._write = gs.Variable("write_index", _INT64, ["R"])
        self.indices = [self._unpack, self._pack, self._write]
        self._distances: gs.Variable | None = None
        self._row: gs.Variable | None = None
        self._masks: dict[int, gs.Variable] = {}
        self._biases: dict[tuple[int, bytes], gs.Variable] = {}

    def lower(self, node: gs.Node, layer: int) -> None:
        edit, attrs, where = self._edit, node.attrs, scope(node)
        if attrs["softcap"] or operand(node, 11) is not None:
            what = "a softcap" if attrs["softcap"] else "sinks"
            raise UnsupportedModelError(f"{node.name}: {what}, which native attention lacks: build with the plugin")
        heads, kv_heads, dim = attrs["num_heads"], attrs["kv_num_heads"], attrs["head_dim"]
        dtype = np.dtype(node.outputs[0].dtype)
        rows: list[gs.Tensor] = list(node.inputs[:3])
        if operand(node, 8) is not None:
            rows[:2] = [self._turned(node, t, n) for t, n in zip(rows[:2], (heads, kv_heads), strict=True)]
        q, *update = (self._by_slot(where, t, n, dim) for t, n in zip(rows, (heads, kv_heads, kv_heads), strict=True))
        cache = [q]
        shape = ["R", kv_heads, self._capacity, dim]
        for what, new in zip(("key", "value"), update, strict=True):
            past = gs.Variable(f"past_{what}.{layer}", dtype, shape)
            present = edit.add("TensorScatter", where, [past, new, self._write], {"axis": 2}, dtype=dtype, shape=shape)
            present.name = f"present_{what}.{layer}"
            edit.surgeon.inputs.append(past)
            edit.surgeon.outputs.append(present)
            cache.append(present)
        slopes = operand(node, 10)
        mask = self._mask(attrs["window"]) if slopes is None else self._biased(attrs["window"], slopes, dtype)
        out = edit.add("Attention", where, [*cache, mask], {"scale": attrs["scale"]}, dtype=dtype, shape=q.shape)
        edit.replace(node.outputs[0], self._by_token(where, out, heads * dim))
        node.outputs.clear()

    def _turned(self, node: gs.Node, rows: gs.Tensor, heads: int) -> gs.Tensor:
        """RoPE of rows [T, heads · dim], computed in float32."""
        where, dtype = scope(node), np.dtype(rows.dtype)
        if self._row is None:
            wide = self._add("Cast", "positions", self._positions, shape=["T"], dtype=_INT64, to=onnx_dtype(_INT64))
            self._row = self._add("Unsqueeze", "positions", wide, self._ints(0), shape=[1, "T"], dtype=_INT64)
        x = self._add("Cast", where, rows, shape=rows.shape, dtype=_WIDE, to=onnx_dtype(_WIDE))
        batch = self._add("Unsqueeze", where, x, self._ints(0), shape=[1, *rows.shape], dtype=_WIDE)
        cos, sin = node.inputs[8:10]
        options = {
            "interleaved": node.attrs["interleaved"],
            "num_heads": heads,
            "rotary_embedding_dim": 2 * cos.shape[1],
        }
        turned = self._add(
            "RotaryEmbedding", where, batch, cos, sin, self._row, shape=batch.shape, dtype=_WIDE, **options
        )
        flat = self._add("Squeeze", where, turned, self._ints(0), shape=rows.shape, dtype=_WIDE)
        return self._add("Cast", where, flat, shape=rows.shape, dtype=dtype, to=onnx_dtype(dtype))

    def _by_slot(self, where: str, rows: gs.Tensor, heads: int, dim: int) -> gs.Variable:
        """[T, heads · dim] → [R, heads, S, dim]."""
        dtype = np.dtype(rows.dtype)
        unpacked = self._add("Gather", where, rows, self._unpack, shape=["R", "S", heads * dim], dtype=dtype, axis=0)
        split = self._add(
            "Reshape", where, unpacked, self._ints(0, 0, heads, dim), shape=["R", "S", heads, dim], dtype=dtype
        )
        return self._add("Transpose", where, split, shape=["R", heads, "S", dim], dtype=dtype, perm=[0, 2, 1, 3])

    def _by_token(self, where: str, out: gs.Variable, width: int) -> gs.Variable:
        """[R, heads, S, dim] → [T, heads · dim]."""
        _, heads, _, dim = out.shape
        dtype = np.dtype(out.dtype)
        turned = self._add("Transpose", where, out, shape=["R", "S", heads, dim], dtype=dtype, perm=[0, 2, 1, 3])
        flat = self._add("Reshape", where, turned, self._ints(-1, width), shape=[None, width], dtype=dtype)
        return self._add("Gather", where, flat, self._pack, shape=["T", width], dtype=dtype, axis=0)

    def _distance(self) -> gs.Variable:
        """Each key's position less each query's, i32 [R, 1, S, capacity]: keys lie in a slot by their positions."""
        if self._distances is None:
            at = self._add("Gather", "mask", self._positions, self._unpack, shape=["R", "S"], dtype=_INT32, axis=0)
            query = self._add("Unsqueeze", "mask", at, self._ints(1, 3), shape=["R", 1, "S", 1], dtype=_INT32)
            keys = self._edit.constant("mask/keys", np.arange(self._capacity, dtype=np.int32).reshape(1, 1, 1, -1))
            shape = ["R", 1, "S", self._capacity]
            self._distances = self._add("Sub", "mask", keys, query, shape=shape, dtype=_INT32)
        return self._distances

    def _mask(self, window: int) -> gs.Variable:
        """Which keys each query sees, one for all layers with the same window."""
        if window not in self._masks:
            distance = self._distance()

            def compare(op: str, bound: int) -> gs.Variable:
                given = self._edit.constant("mask/bound", np.array(bound, np.int32))
                return self._add(op, "mask", distance, given, shape=distance.shape, dtype=_BOOL)

            seen = compare("LessOrEqual", 0)
            if window:
                seen = self._add("And", "mask", seen, compare("Greater", -window), shape=distance.shape, dtype=_BOOL)
            self._masks[window] = seen
        return self._masks[window]

    def _biased(self, window: int, slopes: gs.Tensor, dtype: np.dtype) -> gs.Variable:
        """ALiBi: slope · (key − query) for what is seen, as a mask that is added to the scores [R, heads, S, capacity]; one for
        all layers with the same window and slopes."""
        values = array(slopes).astype(np.float32).reshape(1, -1, 1, 1)
        key = (window, values.tobytes())
        if key in self._biases:
            return self._biases[key]
        shape = ["R", values.size, "S", self._capacity]
        distance = self._distance()
        wide = self._add("Cast", "mask", distance, shape=distance.shape, dtype=_WIDE, to=onnx_dtype(_WIDE))
        slope = self._edit.constant("mask/slopes", values)
        bias = self._add("Mul", "mask", wide, slope, shape=shape, dtype=_WIDE)
        least = self._edit.constant("mask/least", np.array(np.finfo(np.float16).min, np.float32))
        masked = self._add("Where", "mask", self._mask(window), bias, least, shape=shape, dtype=_WIDE)
        self._biases[key] = self._add("Cast", "mask", masked, shape=shape, dtype=dtype, to=onnx_dtype(dtype))
        return self._biases[key]

    def _ints(self, *values: int) -> gs.Constant:
        return self._edit.constant("sizes", np.array(values, np.int64))

    def _add(self, op: str, where: str, *inputs: gs.Tensor, shape: Any, dtype: np.dtype, **attrs: Any) -> gs.Variable:
        return self._edit.add(op, where, inputs, attrs, dtype=dtype, shape=shape)
