"""q, k and v where they lie: as columns of the product that computes them all."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from llmlab.graph.edit import ints, operand, producer


@dataclass(frozen=True)
class Columns:
    """Columns of `tensor` [rows, width] from `offset` on."""

    tensor: gs.Tensor
    offset: int


def columns(tensor: gs.Tensor) -> Columns:
    """Where the columns of `tensor` [rows, width] come from, seen through every Split and Slice of the last axis."""
    found = Columns(tensor, 0)
    while (source := _source(found.tensor)) is not None:
        found = Columns(source.tensor, found.offset + source.offset)
    return found


def _source(tensor: gs.Tensor) -> Columns | None:
    node = producer(tensor, "Split", "Slice")
    if node is None or [type(d) for d in (node.inputs[0].shape or ())[1:]] != [int]:
        return None
    width = int(node.inputs[0].shape[1])
    if node.op == "Split":
        sizes = ints(operand(node, 1))
        if node.attrs.get("axis", 0) not in (-1, 1) or sizes is None:
            return None
        at = next(i for i, t in enumerate(node.outputs) if t is tensor)
        return Columns(node.inputs[0], sum(sizes[:at]))
    begin, _, axes, step = (ints(operand(node, i)) for i in range(1, 5))
    if begin is None or axes not in ([-1], [1]) or (operand(node, 4) is not None and step != [1]):
        return None
    return Columns(node.inputs[0], min(begin[0] + width if begin[0] < 0 else begin[0], width))
