"""Operators declared for tests."""

from __future__ import annotations

import numpy as np
import onnx

from llmlab.graph.operators.operator import Launch, operator


@operator("testlab::clipped_silu")
class clipped_silu:
    """x · sigmoid(x), at most `limit`."""

    limit: float = 7.0

    def shape(self, x):
        return x

    def reference(self, x):
        return np.minimum(x / (1 + np.exp(-x)), x.dtype.type(self.limit))

    def onnx(self, op, x):
        return op.Min(op.Mul(x, op.Sigmoid(x)), self.limit)

    def triton(self, x):
        import triton
        import triton.language as tl

        @triton.jit
        def kernel(x, out, n, limit, BLOCK: tl.constexpr):
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < n)
            tl.store(out + at, tl.minimum(value * tl.sigmoid(value), limit), mask=at < n)

        n = int(np.prod(x))
        return Launch(kernel, (-(-n // 64),), (n, self.limit), {"BLOCK": 64})


@operator("testlab::running_mean")
class running_mean:
    """Mean of the rows up to each: one that mixes tokens."""

    def shape(self, x):
        return x

    def reference(self, x):
        return np.cumsum(x, -2, dtype=x.dtype) / np.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]

    def onnx(self, op, x):
        ones = op.ConstantOfShape(op.Shape(x), value=onnx.numpy_helper.from_array(np.ones(1, np.float32)))
        return op.Div(op.CumSum(x, np.array(-2)), op.CumSum(ones, np.array(-2)))


@operator("testlab::split_norm")
class split_norm:
    """Halves of the last axis: the first, turned around by `parts`, and the sum of squares of the second."""

    parts: tuple[int, ...] = (1, 2)
    scale: float
    mode: str = "plain"

    def shape(self, x):
        return (*x[:-1], x[-1] // 2), (*x[:-1], 1)

    def reference(self, x):
        half = x.shape[-1] // 2
        return x[..., :half] * np.float32(self.scale), np.square(x[..., half:]).sum(-1, keepdims=True)

    def onnx(self, op, x):
        a, b = op.Split(x, outputs=2, axis=-1, num_outputs=2)
        return op.Mul(a, self.scale), op.ReduceSumSquare(b, [-1])
