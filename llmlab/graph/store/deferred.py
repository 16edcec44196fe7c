"""Constants whose array is computed when it is written, or lies packed until then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from llmlab.graph.store.packed import pack, stored_bytes, unpack


class DeferredValues(LazyValues):
    """A constant whose array is computed when it is written, one at a time, and not kept."""

    sources: Sequence[np.ndarray | DeferredValues] = ()
    """The arrays that it is computed from."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = stored_bytes(shape, dtype)

    def load(self) -> np.ndarray:
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    @property
    def tensor(self) -> TensorProto:
        """The values inside a protobuf, for `Graph.to_onnx`."""
        return onnx.numpy_helper.from_array(self.load())


class Packed(DeferredValues):
    """Four-bit numbers, two in a byte: `packed` uint8 [ceil(count / 2)], an array or a memory map."""

    def __init__(self, packed: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(shape, np.dtype(dtype))
        self.packed = packed
        self.sources = [packed]

    @classmethod
    def of(cls, values: np.ndarray) -> Packed:
        """An array of four-bit numbers, which NumPy holds in a byte each. (The surgeon would write it like that, too.)"""
        return cls(pack(values), values.shape, values.dtype)

    def load(self) -> np.ndarray:
        return unpack(np.asarray(self.packed), self.shape, self.dtype)
