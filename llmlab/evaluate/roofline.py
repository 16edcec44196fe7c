"""The roofline of this machine: what a step can reach at most, given how many operations it does for each byte that it moves.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009). Ceilings are measured with ONNX Runtime itself,
on as many threads as the engine has: a product of one row with a weight larger than the caches (bytes a second), and products of
square matrices in float32 and in int8 (operations a second).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

_WEIGHT = 4096, 8192
"""float32 numbers of the weight that a single row is multiplied by: 128 MiB."""
_SIDE = 768
_RUNS = 5


@dataclass(frozen=True)
class Roofline:
    """What this machine reaches."""

    bytes_per_s: float
    """Of a weight that is read once, for one row."""
    flops_per_s: float
    """float32; a multiplication and an addition are two."""
    int8_ops_per_s: float
    threads: int
    method: str

    def limit(self, intensity: float) -> float:
        """Operations a second at most, in float32, of what does `intensity` operations a byte."""
        return min(self.flops_per_s, intensity * self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """Operations a byte from which on the processor is the limit, and not the memory."""
        return self.flops_per_s / self.bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ridge": self.ridge}


@dataclass(frozen=True)
class Point:
    """A step of an engine, to be placed on a roofline."""

    label: str
    flops: int
    bytes: int
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "intensity": self.intensity, "flops_per_s": self.flops_per_s}


def measure_roofline(threads: int, stop: threading.Event | None = None) -> Roofline:
    """A second or two. The fastest of five runs each. Raises KeyboardInterrupt once `stop` is set."""
    rows, columns = _WEIGHT
    random = np.random.default_rng(0)
    wide = np.empty(_WEIGHT, np.float32)
    wide[:] = random.standard_normal(columns, np.float32)
    reading = _fastest(_product("MatMul", np.ones((1, rows), np.float32), wide, threads), stop)
    del wide
    square = random.standard_normal((_SIDE, _SIDE), np.float32)
    computing = _fastest(_product("MatMul", square, square, threads), stop)
    small = random.integers(0, 256, (_SIDE, _SIDE)).astype(np.uint8)
    integers = _fastest(_product("MatMulInteger", small, small, threads), stop)
    operations = 2 * _SIDE**3
    method = (
        f"ONNX Runtime on {threads} thread{'s' if threads > 1 else ''}, the fastest of {_RUNS} runs: one row by a float32 weight of "
        f"{4 * rows * columns >> 20} MiB; square matrices of {_SIDE} in float32 and uint8"
    )
    return Roofline(4 * rows * columns / reading, operations / computing, operations / integers, threads, method)


def _fastest(run: Callable[[], object], stop: threading.Event | None) -> float:
    run()
    best = float("inf")
    for _ in range(_RUNS):
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def _product(op: str, x: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], object]:
    """x by a constant weight, as ONNX Runtime computes it."""
    import onnxruntime as ort

    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32 if op == "MatMulInteger" else kind, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})
