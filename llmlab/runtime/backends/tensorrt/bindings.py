"""Names that a compiled part binds: where each lies, and what shape it has in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.manifest import KVLayout
from llmlab.runtime.program import Program

UPDATED = ".updated"
"""What a KV pool is called where a part gives it back, changed in place."""
POOL = "kv_cache."


@dataclass(frozen=True)
class Bindings:
    """Of the program's tensors and weights, the step's inputs and the KV pools. Addresses stay for as long as the backend is open."""

    program: Program
    addresses: Mapping[str, int]
    kv: KVLayout
    num_blocks: int

    def address(self, name: str) -> int:
        return self.addresses[name.removesuffix(UPDATED)]

    def shape(self, name: str, step: StepShape) -> tuple[int, ...]:
        if name in self.program.tensors:
            spec = self.program.tensors[name]
            rows = step.tokens if spec.rows == "T" else step.rows
            return (rows, spec.width) if spec.width else (rows,)
        if name in self.program.weights:
            return self.program.weights[name].shape
        if name.startswith(POOL):
            heads, dim = self.kv.layers[int(name.removeprefix(POOL).removesuffix(UPDATED))]
            return (2, self.num_blocks, heads, self.kv.capacity, dim)
        return {
            "query_start": (step.batch + 1,),
            "kv_len": (step.batch,),
            "block_table": (step.batch, step.table_width),
            "logits_index": (step.rows,),
        }.get(name, (step.tokens,))

    def dtype(self, name: str) -> str:
        if name in self.program.tensors:
            return self.program.tensors[name].dtype
        if name in self.program.weights:
            return self.program.weights[name].dtype
        if name.startswith(POOL):
            return self.kv.dtype
        return "int64" if name == "slots" else "int32"
