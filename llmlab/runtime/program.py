"""What a TensorRT engine runs in a step: compiled parts and attention, in order, over named device tensors."""

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
class View:
    """Columns of a tensor from `offset` on, such as q in a packed QKV product."""

    tensor: str
    offset: int = 0


@dataclass(frozen=True)
class RunPlan:
    """Run one compiled part. `inputs` and `outputs` name the plan's bindings and the tensors that are bound to them.

    Beside the program's tensors, what may be bound by name: the step's `input_ids`, `position_ids`, `query_start`, `kv_len`, `block_table`
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
class Program:
    """The steps of one forward pass, and the tensors that they share. The last of them makes `logits` [N, vocab], float32."""

    tensors: Mapping[str, TensorSpec]
    steps: tuple[RunPlan | Attend, ...]

    def to_dict(self) -> dict[str, Any]:
        steps = [{"plan" if isinstance(s, RunPlan) else "attend": asdict(s)} for s in self.steps]
        return {"tensors": {name: asdict(spec) for name, spec in self.tensors.items()}, "steps": steps}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Program:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        tensors = {str(name): TensorSpec(**spec) for name, spec in data["tensors"].items()}
        steps: list[RunPlan | Attend] = []
        for entry in data["steps"]:
            if "plan" in entry:
                steps.append(RunPlan(**entry["plan"]))
            else:
                given = entry["attend"]
                views = {name: View(**given[name]) for name in ("q", "k", "v")}
                steps.append(Attend(**{**given, **views}))
        return cls(tensors, tuple(steps))
