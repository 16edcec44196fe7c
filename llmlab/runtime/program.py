"""What a TensorRT engine runs in a step: compiled parts and kernels, in order, over named device tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Rows = Literal["T", "N"]
"""How many rows a tensor has: new tokens of the step, or rows whose logits are wanted."""


@dataclass(frozen=True)
class TensorSpec:
    """A device tensor [rows, width], laid out row by row. `width` 0: one number a row, [rows]."""

    dtype: str
    """float16, bfloat16, float32, int32 or int64."""
    width: int
    rows: Rows = "T"


@dataclass(frozen=True)
class WeightSpec:
    """A tensor of the engine's weights file."""

    dtype: str
    """float16, bfloat16, float32 or int8."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """Columns of a tensor from `offset` on, such as q in a packed QKV product."""

    tensor: str
    offset: int = 0


@dataclass(frozen=True)
class RunPlan:
    """Run one compiled part. `inputs` and `outputs` name the plan's bindings and the tensors that are bound to them.

    Several steps may run the same plan on different tensors.
    Beside the program's tensors and weights, what may be bound by name: the step's `input_ids`, `position_ids`, `query_start`, `kv_len`, `block_table`
    and `logits_index` (int32 all), and `kv_cache.{layer}`, in place where it is an output too.
    """

    plan: str
    """The file in the engine folder."""
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    name: str = ""
    """The place in the model that it computes, for profiles and errors."""


@dataclass(frozen=True)
class Attend:
    """Launch the attention kernels of one layer: RoPE and the write of k and v, then attention into `out`."""

    layer: int
    """Number of its KV pool."""
    q: View
    k: View
    v: View
    out: str
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    interleaved: bool = False
    tables: Mapping[str, str] = field(default_factory=dict)
    """Which of `cos`, `sin`, `alibi_slopes`, `sinks`, `k_scale`, `v_scale` it has, and the name of each in the engine's tables file (float32)."""
    name: str = ""


@dataclass(frozen=True)
class Multiply:
    """Launch the kernel of a linear layer: out = act(x·Wg + bg) * (x·Wu + bu), or x·W + bias + add.

    `weight`, `bias` and `scale` name tensors of the weights file: [width, depth], with a gate [2 · width, depth], the gate's
    rows first; bias as long as it has rows; scale float16, one a row or a group of `group` columns.
    """

    x: View
    weight: str
    out: str
    depth: int
    width: int
    weight_dtype: str
    """float16, bfloat16, int8, or int4: two values a byte."""
    group: int = 0
    rounded: str = ""
    """`int8` where the rows of x are rounded to int8, each by its largest number, before they are multiplied; empty for none."""
    gate: str = ""
    scale: str | None = None
    bias: str | None = None
    add: str | None = None
    """A tensor [rows, width] that is added: the residual."""
    name: str = ""


@dataclass(frozen=True)
class Normalize:
    """Launch the kernel of an RMS norm: out = x / sqrt(mean(x²) + epsilon) · weight, by row of `width` columns."""

    x: View
    weight: str
    """A tensor [width] of the weights file."""
    out: str
    width: int
    epsilon: float
    name: str = ""


Step = RunPlan | Attend | Multiply | Normalize
_KINDS: dict[str, type[Step]] = {"plan": RunPlan, "attend": Attend, "multiply": Multiply, "normalize": Normalize}


@dataclass(frozen=True)
class Program:
    """The steps of one forward pass, and the tensors that they share. The last of them makes `logits` [N, vocab], float32."""

    tensors: Mapping[str, TensorSpec]
    steps: tuple[Step, ...]
    weights: Mapping[str, WeightSpec] = field(default_factory=dict)
    """What lies in the weights file: all that products and norms read, and what parts read from outside."""

    def to_dict(self) -> dict[str, Any]:
        kinds = {cls: kind for kind, cls in _KINDS.items()}
        return {
            "tensors": {name: asdict(spec) for name, spec in self.tensors.items()},
            "weights": {name: asdict(spec) for name, spec in self.weights.items()},
            "steps": [{kinds[type(step)]: asdict(step)} for step in self.steps],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Program:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        tensors = {str(name): TensorSpec(**spec) for name, spec in data["tensors"].items()}
        weights = {
            str(name): WeightSpec(spec["dtype"], tuple(spec["shape"]))
            for name, spec in data.get("weights", {}).items()  # engines from before there were any have none
        }
        steps: list[Step] = []
        for entry in data["steps"]:
            ((kind, given),) = entry.items()
            if kind not in _KINDS:
                raise ValueError(f"a step is {kind!r}, expected one of {', '.join(_KINDS)}")
            views = {name: View(**given[name]) for name in ("q", "k", "v", "x") if name in given}
            steps.append(_KINDS[kind](**{**given, **views}))
        return cls(tensors, tuple(steps), weights)
