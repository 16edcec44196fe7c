"""What ONNX's operators take and give."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import onnx


class Signature(NamedTuple):
    """What an operator takes and gives."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    attributes: dict[str, int]
    required: tuple[str, ...]


@cache
def standard_signature(op: str, version: int) -> Signature | None:
    """Of an operator of ONNX's own in an opset; None where there is none, or it is deprecated."""
    if not onnx.defs.has(op):
        return None
    try:
        schema = onnx.defs.get_schema(op, version)
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    attributes = {name: int(a.type.value) for name, a in schema.attributes.items()}
    required = tuple(name for name, a in schema.attributes.items() if a.required)
    return Signature((schema.min_input, schema.max_input), (schema.min_output, schema.max_output), attributes, required)
