"""What a PagedAttention node in a TensorRT network is: its attributes, its inputs in order, their shapes and types.

Knows neither TensorRT nor a GPU, so that what the plugin answers and hands to the kernels can be tested anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from llmlab.errors import EngineError
from llmlab.kernels.gpu.geometry import AttentionKind

Shape = tuple[int, ...]

ACTIVATIONS = ("float16", "bfloat16")
QUANTIZED_POOLS = ("int8", "float8_e4m3fn")
_FIXED = {"slots": "int64", **dict.fromkeys(("query_start", "kv_len", "block_table", "position_ids"), "int32")}
_ROWS = ("qkv", "q", "k", "v", "out")


@dataclass(frozen=True)
class AttentionNode:
    """Attributes of `llmlab::PagedAttention` as the plugin lowering writes them: they say which inputs follow one another.

    packed: q, k and v are columns of one tensor `qkv` [T, (num_heads + 2 · kv_num_heads) · head_dim]. rotary: channels of a
    head that turn, 0 for no RoPE. quantized: the pool is int8 or float8, with one scale per KV head for keys and for values.
    """

    num_heads: int
    kv_num_heads: int
    head_dim: int
    block_size: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    interleaved: int = 0
    rotary: int = 0
    packed: int = 0
    alibi: int = 0
    sinks: int = 0
    quantized: int = 0

    @classmethod
    def from_attributes(cls, given: Mapping[str, float]) -> AttentionNode:
        """Raises EngineError where one is missing or out of range."""
        missing = [f.name for f in fields(cls) if f.name not in given]
        if missing:
            raise EngineError(f"PagedAttention lacks {', '.join(missing)}: build the engine with this llmlab again")
        values = {f.name: (float if f.type == "float" else int)(given[f.name]) for f in fields(cls)}
        node = cls(**values)  # type: ignore[arg-type]
        sizes = (node.num_heads, node.kv_num_heads, node.head_dim, node.block_size)
        if (
            min(sizes) < 1
            or node.num_heads % node.kv_num_heads
            or not 0 <= node.rotary <= node.head_dim
            or node.rotary % 2
        ):
            raise EngineError(f"PagedAttention has attributes that no model has: {node}")
        return node

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the node's inputs, in order."""
        given = ["qkv"] if self.packed else ["q", "k", "v"]
        given += ["pool", "query_start", "kv_len", "block_table", "position_ids", "slots"]
        given += ["cos", "sin"] if self.rotary else []
        given += ["alibi_slopes"] if self.alibi else []
        given += ["sinks"] if self.sinks else []
        return tuple(given + (["k_scale", "v_scale"] if self.quantized else []))

    @property
    def pool(self) -> int:
        """Which input is the KV pool, that output 1 is in place."""
        return self.inputs.index("pool")

    @property
    def kind(self) -> AttentionKind:
        return AttentionKind(
            num_heads=self.num_heads,
            kv_heads=self.kv_num_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            window=self.window,
            softcap=self.softcap,
            alibi=bool(self.alibi),
            sinks=bool(self.sinks),
            quantized=bool(self.quantized),
        )

    @property
    def width(self) -> int:
        """Columns of q and of the output."""
        return self.num_heads * self.head_dim

    def takes(self, name: str, dtype: str, rows: str) -> bool:
        """Whether input or output `name` may have type `dtype`, where q, k, v and the output are in `rows`."""
        if name in _ROWS:
            return dtype == rows and dtype in ACTIVATIONS
        if name == "pool":
            return dtype in QUANTIZED_POOLS if self.quantized else dtype == rows
        return dtype == _FIXED.get(name, "float32")

    def check_types(self, types: Sequence[str]) -> None:
        """Raises EngineError where the inputs' types are none that the kernels are made for."""
        if len(types) != len(self.inputs):
            raise EngineError(
                f"PagedAttention has {len(types)} inputs, expected {len(self.inputs)}: {', '.join(self.inputs)}"
            )
        for name, dtype in zip(self.inputs, types, strict=True):
            if not self.takes(name, dtype, types[0]):
                raise EngineError(
                    f"PagedAttention's {name} is {dtype} where its rows are {types[0]}: rows are float16 or bfloat16, the pool "
                    f"{' or '.join(QUANTIZED_POOLS) if self.quantized else 'as the rows'}, indices int32 (slots int64), tables float32"
                )

    def check_shapes(self, shapes: Sequence[Shape]) -> None:
        """Raises EngineError where widths don't fit the attributes (a size that isn't known yet is -1)."""
        kv, dim = self.kv_num_heads, self.head_dim
        expected: dict[str, Shape] = {
            "qkv": (-1, self.width + 2 * kv * dim),
            "q": (-1, self.width),
            "k": (-1, kv * dim),
            "v": (-1, kv * dim),
            "pool": (2, -1, kv, self.block_size, dim),
            "block_table": (-1, -1),
            **dict.fromkeys(("query_start", "kv_len", "position_ids", "slots"), (-1,)),
            **dict.fromkeys(("cos", "sin"), (-1, self.rotary // 2)),
            **dict.fromkeys(("alibi_slopes", "sinks"), (self.num_heads,)),
            **dict.fromkeys(("k_scale", "v_scale"), (kv,)),
        }
        for name, shape in zip(self.inputs, shapes, strict=True):
            wanted = expected[name]
            if len(shape) != len(wanted) or any(a != b for a, b in zip(shape, wanted, strict=True) if -1 not in (a, b)):
                raise EngineError(f"PagedAttention's {name} is {list(shape)}, expected {list(wanted)} (-1: any)")
