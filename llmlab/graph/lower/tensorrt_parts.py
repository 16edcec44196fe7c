"""What lowering for TensorRT gives: parts to compile, what kernels compute between them, and the tensors that they hand each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmlab.graph.graph import Graph
from llmlab.graph.lower.origins import Origins
from llmlab.graph.store.lazy import Values

Rows = Literal["T", "N"]
"""A row for each new token of the step, or for each whose logits are wanted."""


@dataclass(frozen=True)
class Tensor:
    """What parts hand each other: [rows, width], row by row, or [rows] where `width` is 0."""

    dtype: str
    """float16, bfloat16, float32 or int32. Under weak typing the part that makes it may declare another one in its ONNX."""
    width: int
    rows: Rows


@dataclass(frozen=True)
class View:
    """Columns of a tensor from `offset` on, such as q in a packed QKV product."""

    tensor: str
    offset: int = 0


@dataclass(frozen=True)
class Dense:
    """A part to compile: ordinary operators, and in `plugin` hosting PagedAttention nodes."""

    name: str
    """The place in the model that it computes."""
    graph: Graph
    """To be written by `write_onnx`; its inputs and outputs have the program's names."""
    key: str
    """Parts with the same key differ in names and weights alone; where weights lie outside, in names alone, and their inputs
    and outputs correspond in order."""
    keep_fp32: tuple[str, ...] = ()
    """Under weak typing, names of nodes that have to compute in float32: norms, softmax, routers, RoPE, what follows the head."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.graph.surgeon.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.graph.surgeon.outputs)


@dataclass(frozen=True)
class Attend:
    """One layer's attention: RoPE, the write of k and v into pool `layer`, and the attention itself into tensor `out`."""

    name: str
    layer: int
    q: View
    k: View
    v: View
    out: str
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    interleaved: bool
    tables: Mapping[str, str]
    """Which of `cos`, `sin`, `alibi_slopes`, `sinks`, `k_scale`, `v_scale` it has, by name in `Lowered.tables`."""


@dataclass(frozen=True)
class Multiply:
    """One linear layer that a kernel computes: out = act(x·Wg + bg) * (x·Wu + bu), or x·W + bias + add.

    `weight` [width, depth], with a gate [2 · width, depth]: the gate's rows first. `bias` is as long as it has rows.
    """

    name: str
    x: View
    weight: str
    """In `Lowered.weights`, as are `bias` and `scale`."""
    out: str
    depth: int
    width: int
    weight_dtype: str
    group: int = 0
    """Columns that share a scale, where the weight is quantized; 0: one scale a row."""
    rounded: str = ""
    """`int8` where the rows of x are rounded to int8, each by its largest number, before they are multiplied; empty for none."""
    gate: str = ""
    """`silu`, `gelu`, `gelu_tanh` or `relu`; empty for none."""
    scale: str | None = None
    bias: str | None = None
    add: str | None = None
    """A tensor [rows, width] that is added: the residual."""


@dataclass(frozen=True)
class Normalize:
    """An RMS norm that a kernel computes: out = x / sqrt(mean(x²) + epsilon) · weight, by row of `width` columns."""

    name: str
    x: View
    weight: str
    """[width], in `Lowered.weights`."""
    out: str
    width: int
    epsilon: float


@dataclass(frozen=True)
class Lowered:
    """Parts in executable order. The last gives `logits` [N, vocab] in float32."""

    parts: tuple[Dense | Attend | Multiply | Normalize, ...]
    tensors: Mapping[str, Tensor]
    """What parts make, by name. Their other inputs are weights, and the step's: those of the serving graph, as int32."""
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 arrays that the attention between the parts reads."""
    weights: Mapping[str, Values] = field(default_factory=dict)
    """What kernels and parts read from outside, each computed when it is written."""
    origins: Origins = field(default_factory=Origins)
    """Which nodes of the graph became which of the parts, by the names of these; of kernels by `name`."""
