"""A norm and an MLP as ONNX files, for TensorRT to build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

WIDTH, HIDDEN = 64, 128
_STRONG = """<ir_version: 10, opset_import: ["": 23]>
mlp (float16[T, 64] x) => (float16[T, 64] y) {
    [n_wide] wide = Cast<to = 1>(x)
    [n_norm] norm = RMSNormalization<axis = -1, epsilon = 1e-5>(wide, scale)
    [n_half] half = Cast<to = 10>(norm)
    [gate] gate = MatMul(half, gate_weight)
    [up] up = MatMul(half, up_weight)
    [sigmoid] sigmoid = Sigmoid(gate)
    [silu] silu = Mul(gate, sigmoid)
    [product] product = Mul(silu, up)
    [down] down = MatMul(product, down_weight)
    [residual] y = Add(x, down)
}"""


def mlp(path: Path, *, external: bool = False, seed: int = 0) -> Path:
    """A typed float16 MLP behind a float32 norm, written as `path`; `external`: its weights in a file beside it."""
    random = np.random.default_rng(seed)
    model = onnx.parser.parse_model(_STRONG)
    sizes = {"gate_weight": (WIDTH, HIDDEN), "up_weight": (WIDTH, HIDDEN), "down_weight": (HIDDEN, WIDTH)}
    weights = {name: (random.standard_normal(size) / 8).astype(np.float16) for name, size in sizes.items()}
    weights["scale"] = np.ones(WIDTH, np.float32)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


_WEAK = """<ir_version: 8, opset_import: ["": 17]>
mlp (float[T, 64] x) => (float[T, 64] y) {
    two = Constant<value_float = 2.0>()
    epsilon = Constant<value_float = 1e-5>()
    [norm_square] square = Pow(x, two)
    [norm_mean] mean = ReduceMean<axes = [-1], keepdims = 1>(square)
    [norm_stable] stable = Add(mean, epsilon)
    [norm_root] root = Sqrt(stable)
    [norm] norm = Div(x, root)
    [gate] gate = MatMul(norm, gate_weight)
    [sigmoid] sigmoid = Sigmoid(gate)
    [silu] silu = Mul(gate, sigmoid)
    [down] down = MatMul(silu, down_weight)
    [residual] y = Add(x, down)
}"""
NORM = ("norm_square", "norm_mean", "norm_stable", "norm_root", "norm")


def weak_mlp(path: Path) -> Path:
    """The same in float32 and opset 17, for a TensorRT that chooses precisions itself; its norm is in primitives."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(_WEAK)
    for name, size in {"gate_weight": (WIDTH, HIDDEN), "down_weight": (HIDDEN, WIDTH)}.items():
        weight = (random.standard_normal(size) / 8).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, path)
    return path
