"""A layer's KV cache as ONNX Runtime's CPU can hold it: float32, int8 and int4 by its own operator; others' numbers as float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand, scope
from llmlab.graph.graph import KVLayer
from llmlab.graph.store.storage import array, onnx_dtype
from llmlab.kernels.kv_cache import BITS, per_channel

K_SCALE, V_SCALE = 12, 13
"""Inputs of PagedAttention, and of GroupQueryAttention as well."""
_F32 = np.dtype(np.float32)
_WIDTH_STEP = 8  # channels of a head come in multiples of this
_BASES = {"int8": 128, "int4": 8}
_HELD = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}


@dataclass(frozen=True)
class SlotCache:
    """The cache of one layer. `dtype`: int8, int4 or float32, of its numbers. `held`: of its bytes."""

    edit: Editor
    node: gs.Node
    layer: KVLayer
    capacity: int
    """Tokens of a slot."""
    alibi: bool
    """Whether positions lie beside the keys."""

    @property
    def dtype(self) -> str:
        return self.layer.dtype.name if self.layer.dtype.name in _HELD else "float32"

    @property
    def places(self) -> tuple[float, ...]:
        """What each channel that holds a position counts: 1, or for numbers of few bits the powers of a base that they reach."""
        if not self.alibi:
            return ()
        base = _BASES.get(self.dtype, self.capacity)
        return tuple(float(base**i) for i in range(32) if i == 0 or base**i < self.capacity)

    @property
    def width(self) -> int:
        """Channels of a head in the operator: positions come behind the keys, and zeros fill it up."""
        return -(-(self.layer.head_dim + len(self.places)) // _WIDTH_STEP) * _WIDTH_STEP

    @property
    def rounds(self) -> bool:
        """Whether the numbers are rounded before they are written, to a type that the operator lacks."""
        return self.dtype == "float32" and self.layer.dtype != _F32

    @property
    def held(self) -> np.dtype:
        return _HELD.get(self.dtype, _F32)

    @property
    def channels(self) -> int:
        """Of `held`, in a head: two numbers of four bits share a byte, the first in the low half."""
        return self.width * BITS[self.dtype] // (8 * self.held.itemsize)

    def attributes(self) -> dict[str, Any]:
        """What GroupQueryAttention has to be told."""
        if self.dtype == "float32":
            return {}
        kinds = ["PER_TENSOR" if s.size == 1 else "PER_CHANNEL" for s in self._scales()]
        return {"k_quant_type": kinds[0], "v_quant_type": kinds[1], "kv_cache_bit_width": BITS[self.dtype]}

    def scales(self) -> list[gs.Tensor | None]:
        """The operator's inputs k_scale and v_scale."""
        if self.dtype == "float32":
            return [None, None]
        where = scope(self.node)
        return [
            self.edit.constant(f"{where}/{what}_scale", scale) for what, scale in zip("kv", self._scales(), strict=True)
        ]

    def rounded(self, rows: list[gs.Tensor]) -> list[gs.Tensor]:
        """q, k, v [T, heads · head_dim] with k and v as the cache's type would keep them."""
        if not self.rounds:
            return rows
        where, made = scope(self.node), rows[:1]
        if operand(self.node, K_SCALE) is None:  # half precision
            for tensor in rows[1:]:
                for dtype in (self.layer.dtype, _F32):
                    tensor = self.edit.add(
                        "Cast", where, [tensor], {"to": onnx_dtype(dtype)}, dtype=dtype, shape=tensor.shape
                    )
                made.append(tensor)
            return made
        for tensor, index in zip(rows[1:], (K_SCALE, V_SCALE), strict=True):
            scale = self.edit.constant(f"{where}/scale", self._by_channel(index, self.layer.head_dim).reshape(-1))
            zero = self.edit.constant(f"{where}/zero", np.zeros(scale.shape, self.layer.dtype))
            pair, axis = [scale, zero], {"axis": 1}
            low = self.edit.add(
                "QuantizeLinear", where, [tensor, *pair], axis, dtype=self.layer.dtype, shape=tensor.shape
            )
            made.append(self.edit.add("DequantizeLinear", where, [low, *pair], axis, dtype=_F32, shape=tensor.shape))
        return made

    def _scales(self) -> list[np.ndarray]:
        """One number where all are the same, else one for each channel [1, kv_heads, 1, width]."""
        found = [self._by_channel(index, self.width) for index in (K_SCALE, V_SCALE)]
        real = self.width if self.alibi else self.layer.head_dim  # a position's scale is 1
        return [s[:1, 0] if (s[:, :real] == s[0, 0]).all() else s.reshape(1, len(s), 1, -1) for s in found]

    def _by_channel(self, index: int, width: int) -> np.ndarray:
        """[kv_heads, width]; channels that are always zero have scale 1."""
        dim = self.layer.head_dim
        full = np.ones((self.layer.kv_heads, width), np.float32)
        full[:, :dim] = per_channel(array(self.node.inputs[index]), self.layer.kv_heads, dim)
        return full
