"""A program that lowering for TensorRT gave, run part by part: ONNX Runtime (its own optimisations off) for the compiled
parts, the NumPy reference for attention, NumPy for products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from llmlab.graph.interpret import KERNELS, unwritten
from llmlab.graph.lower.tensorrt_parts import Attend, Dense, Lowered, Multiply, Normalize, View
from llmlab.graph.store.storage import loaded
from llmlab.kernels.activations import ACTIVATIONS
from llmlab.kernels.reference import paged_attention

Arrays = Mapping[str, np.ndarray]


class Execution:
    """The parts of a program, and the KV pools that they share (full of NaN at first).

    evaluator: `onnxruntime`, or `reference` for types that its CPU lacks. pools: their type, where they are quantized.
    """

    def __init__(
        self,
        lowered: Lowered,
        num_blocks: int,
        block_size: int,
        evaluator: str = "onnxruntime",
        pools: np.dtype | None = None,
    ) -> None:
        self.lowered = lowered
        make = _in_ort if evaluator == "onnxruntime" else _evaluated
        dense = [part for part in lowered.parts if isinstance(part, Dense)]
        first = {
            part.key: part for part in reversed(dense)
        }  # where weights lie outside, one plan serves all of its key
        alike = {part.key: make(part) for part in first.values()} if lowered.weights else {}
        self._run = {part.name: (alike[part.key] if lowered.weights else make(part)) for part in dense}
        self._first = {part.name: first[part.key] if lowered.weights else part for part in dense}
        self.weights = {name: np.asarray(loaded(values)) for name, values in lowered.weights.items()}
        self.pools = {
            part.layer: unwritten(
                (2, num_blocks, part.kv_heads, block_size, part.head_dim), pools or _dtype(lowered, part.out)
            )
            for part in lowered.parts
            if isinstance(part, Attend)
        }

    def step(self, feeds: Arrays) -> np.ndarray:
        """Run one step on the serving graph's inputs (all but the caches); returns logits [N, vocab]."""
        values = {**self.weights, **{name: np.asarray(array, np.int32) for name, array in feeds.items()}}
        for part in self.lowered.parts:
            if isinstance(part, Attend):
                values[part.out] = self._attend(part, values)
                continue
            if isinstance(part, Multiply | Normalize):
                compute = self._multiply if isinstance(part, Multiply) else self._normalize
                values[part.out] = compute(part, values)
                continue
            names = zip(self._first[part.name].inputs, part.inputs, strict=True)
            made = self._run[part.name]({binding: values[name] for binding, name in names})
            for name, array in zip(part.outputs, made, strict=True):
                spec = self.lowered.tensors[name]
                rows = len(feeds["input_ids" if spec.rows == "T" else "logits_index"])
                assert array.shape == ((rows, spec.width) if spec.width else (rows,)), name
                values[name] = array.astype(spec.dtype)
        return values["logits"]

    def _multiply(self, part: Multiply, values: Arrays) -> np.ndarray:
        x = values[part.x.tensor][:, part.x.offset : part.x.offset + part.depth]
        weight = values[part.weight]
        assert self.lowered.tensors[part.out].width == part.width
        if part.scale is None:
            assert x.dtype == weight.dtype == np.dtype(part.weight_dtype)
        else:
            assert weight.dtype == np.int8 and values[part.scale].dtype == np.float16
            bits = {"int8": 8, "int4": 4}[part.weight_dtype]
            weight = dequantized(weight, values[part.scale], bits, part.depth, part.group, packed=not part.rounded)
        x = rounded(x) if part.rounded else x
        assert weight.shape == (part.width * (2 if part.gate else 1), part.depth)
        out = product(x, weight, part.gate, *(None if n is None else values[n] for n in (part.bias, part.add)))
        return out.astype(_dtype(self.lowered, part.out))

    def _normalize(self, part: Normalize, values: Arrays) -> np.ndarray:
        x = values[part.x.tensor][:, part.x.offset : part.x.offset + part.width]
        return norm(x, values[part.weight], part.epsilon).astype(_dtype(self.lowered, part.out))

    def _attend(self, part: Attend, values: Arrays) -> np.ndarray:
        def columns(view: View, heads: int) -> np.ndarray:
            return values[view.tensor][:, view.offset : view.offset + heads * part.head_dim]

        q, k, v = columns(part.q, part.num_heads), columns(part.k, part.kv_heads), columns(part.v, part.kv_heads)
        metadata = [values[n] for n in ("query_start", "kv_len", "block_table", "position_ids")]
        out, self.pools[part.layer] = paged_attention(
            *(q, k, v, self.pools[part.layer], *metadata),
            **{what: self.lowered.tables[name] for what, name in part.tables.items()},
            num_heads=part.num_heads,
            kv_num_heads=part.kv_heads,
            head_dim=part.head_dim,
            scale=part.scale,
            window=part.window,
            softcap=part.softcap,
            interleaved=part.interleaved,
        )
        assert out.dtype == _dtype(self.lowered, part.out)
        return out


def product(
    x: np.ndarray, weight: np.ndarray, gate: str, bias: np.ndarray | None, add: np.ndarray | None
) -> np.ndarray:
    """What a product's kernel computes, in float32."""
    out = x.astype(np.float32) @ weight.astype(np.float32).T
    if bias is not None:
        assert bias.dtype.itemsize == 2
        out += bias.astype(np.float32)
    if gate:
        act, up = np.split(out, 2, axis=1)
        out = ACTIVATIONS[gate](act) * up
    if add is not None:
        assert add.dtype.itemsize == 2
        out += add.astype(np.float32)
    return out


def dequantized(
    stored: np.ndarray, scale: np.ndarray, bits: int, depth: int, group: int, *, packed: bool
) -> np.ndarray:
    """A weight float32 [N, K] from its integers as kernels read them (`packed`: words of columns that are 8 apart)."""
    values = stored.astype(np.int32)
    if packed:
        places = 16 // bits
        words = stored.view(np.uint16).reshape(len(stored), depth // (8 * places), 1, 8).astype(np.int32)
        fields = words >> (bits * np.arange(places)).reshape(1, 1, places, 1) & ((1 << bits) - 1)
        values = np.where(fields >= 1 << (bits - 1), fields - (1 << bits), fields).reshape(len(stored), depth)
    spread = np.repeat(scale, group, axis=1) if group else scale[:, None]
    return values.astype(np.float32) * spread.astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows as int8 holds them, each by its largest number."""
    step = np.maximum(np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / 127, 1e-12)
    return np.clip(np.rint(x.astype(np.float32) / step), -127, 127) * step


def norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """What an RMS norm's kernel computes, in float32."""
    wide = x.astype(np.float32)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + np.float32(epsilon)) * weight.astype(np.float32)


def _dtype(lowered: Lowered, name: str) -> np.dtype:
    import ml_dtypes

    dtype = lowered.tensors[name].dtype
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _in_ort(part: Dense) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = part.graph.to_onnx().SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    types = {i.name: i.type for i in session.get_inputs()}

    def run(values: Arrays) -> Sequence[np.ndarray]:
        feeds = {n: values[n].astype(np.float32) if t == "tensor(float)" else values[n] for n, t in types.items()}
        return session.run(None, feeds)

    return run


def _evaluated(part: Dense) -> Any:
    evaluator = ReferenceEvaluator(part.graph.to_onnx(), new_ops=list(KERNELS))
    return lambda values: evaluator.run(None, {n: values[n] for n in part.inputs})
