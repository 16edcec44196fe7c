"""Run a serving graph with ONNX's own reference evaluator and the NumPy plugin node: slow, and the oracle of all targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_layer_normalization import LayerNormalization
from onnx.reference.ops.op_matmul import MatMul
from onnx.reference.ops.op_rms_normalization import RMSNormalization
from onnx.reference.ops.op_sigmoid import Sigmoid

from llmlab.graph.graph import LLMLAB_DOMAIN, Graph
from llmlab.kernels.activations import ACTIVATIONS, gated_activation
from llmlab.kernels.experts import mixture_of_experts
from llmlab.kernels.kv_cache import RANGES
from llmlab.kernels.reference import paged_attention


class PagedAttention(OpRun):
    """The plugin node, as the reference evaluator calls it."""

    op_domain = LLMLAB_DOMAIN

    def _run(self, *inputs: Any, **attrs: Any) -> tuple[np.ndarray, ...]:
        tensors: list[Any] = [None if i is None or (np.size(i) == 0 and np.ndim(i) == 0) else i for i in inputs]
        interleaved = bool(attrs.pop("interleaved", 0))
        known = {k: attrs[k] for k in ("num_heads", "kv_num_heads", "head_dim", "scale", "window", "softcap")}
        return paged_attention(*tensors, interleaved=interleaved, **known)


class MixtureOfExperts(OpRun):
    """The experts' node, as the reference evaluator calls it."""

    op_domain = LLMLAB_DOMAIN

    def _run(self, *inputs: Any, **attrs: Any) -> tuple[np.ndarray, ...]:
        known = {k: attrs[k] for k in ("activation", "interleaved", "transposed", "alpha", "beta", "limit")}
        return (mixture_of_experts(*inputs, **known),)


class GatedActivation(OpRun):
    """The gated product, as the reference evaluator calls it."""

    op_domain = LLMLAB_DOMAIN

    def _run(self, gate_up: np.ndarray, *, activation: str, alpha: float, gate_first: int) -> tuple[np.ndarray]:
        return (gated_activation(gate_up, activation=activation, alpha=alpha, gate_first=bool(gate_first)),)


class Gelu(OpRun):
    """The standard operator, for which the reference evaluator has no kernel but a body that rounds at each step."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        return (ACTIVATIONS["gelu_tanh" if approximate == "tanh" else "gelu"](x, 1.0),)


class _Wide(OpRun):
    """Half precision in and out, float32 inside, rounded once: what accelerators do, and what `stash_type` asks of norms.

    The reference evaluator's own kernels compute in the type that they are given.
    """

    def _run(self, *inputs: Any, **attrs: Any) -> tuple[np.ndarray, ...]:
        narrow = {np.dtype(i.dtype) for i in inputs if i is not None and i.dtype.name in ("float16", "bfloat16")}
        wide = [i.astype(np.float32) if i is not None and i.dtype in narrow else i for i in inputs]
        results = super()._run(*wide, **attrs)
        return tuple(r.astype(min(narrow)) if narrow and r.dtype == np.float32 else r for r in results)


_ROUNDED = tuple(
    type(kernel.__name__, (_Wide, kernel), {"op_domain": kernel.op_domain})
    for kernel in (MatMul, Gelu, Sigmoid, RMSNormalization, LayerNormalization, GatedActivation, MixtureOfExperts)
)
KERNELS = (PagedAttention, *_ROUNDED)
"""What the reference evaluator needs to know beside its own kernels."""


def unwritten(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A pool whose numbers would be seen if they were read: NaN, or the lowest number of an integer type."""
    return np.full(shape, RANGES[dtype.name][0] if dtype.name.startswith("int") else np.nan, dtype)


class Interpreter:
    """A serving graph, executed step by step; the KV pools live in `caches`."""

    def __init__(self, graph: Graph, num_blocks: int, block_size: int) -> None:
        self._run = ReferenceEvaluator(graph.to_onnx(), new_ops=list(KERNELS))
        self._layers = graph.kv_layers()
        self.caches: dict[str, np.ndarray] = {}
        self.reset(num_blocks, block_size)

    def reset(self, num_blocks: int, block_size: int) -> None:
        """Begin again with pools of this size, in which nothing is written."""
        self.caches = {
            layer.name: unwritten((2, num_blocks, layer.kv_heads, block_size, layer.head_dim), layer.dtype)
            for layer in self._layers
        }

    def step(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one step on the serving graph's inputs (all but the caches); returns logits [N, vocab]."""
        logits, *caches = self._run.run(None, {**feeds, **self.caches})
        for name, cache in zip(self.caches, caches, strict=True):
            self.caches[name] = cache
        return logits
