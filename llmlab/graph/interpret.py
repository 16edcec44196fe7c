"""Run a serving graph with ONNX's own reference evaluator and the NumPy plugin node: slow, and the oracle of all targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from llmlab.graph.graph import LLMLAB_DOMAIN, Graph
from llmlab.kernels.activations import gated_activation
from llmlab.kernels.experts import mixture_of_experts
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


class Interpreter:
    """A serving graph, executed step by step; the KV pools live in `caches`."""

    def __init__(self, graph: Graph, num_blocks: int, block_size: int) -> None:
        self._run = ReferenceEvaluator(graph.to_onnx(), new_ops=[PagedAttention, MixtureOfExperts, GatedActivation])
        self.caches = {
            layer.name: np.full((2, num_blocks, layer.kv_heads, block_size, layer.head_dim), np.nan, np.float32)
            for layer in graph.kv_layers()
        }

    def step(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one step on the serving graph's inputs (all but the caches); returns logits [N, vocab]."""
        logits, *caches = self._run.run(None, {**feeds, **self.caches})
        for name, cache in zip(self.caches, caches, strict=True):
            self.caches[name] = cache
        return logits
