"""What a kernel is compiled from: a Triton function, its types and constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRITON_TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int8": "*i8",
    "float8_e4m3fn": "*fp8e4nv",
}


@dataclass(frozen=True)
class KernelSource:
    """A Triton function, and what it is to be compiled for.

    types: Triton's for each parameter that isn't a constant (`*fp16`, `i32`), in any order. null: parameters that nothing reads here.
    aligned: parameters that are multiples of 16 whatever is launched. labels: what tells the result from others, beside the constants.
    """

    function: str
    """module:name"""
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    null: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
