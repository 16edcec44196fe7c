"""What a rule about rows sees of a node, the reasons that rules give, and what most of them ask.

A rule gets the `Rows` of a node and returns None where each row (token) of the output depends on the same row of the
inputs alone, or the reason why tokens may meet. Axes are those that count tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from llmlab.graph.edit import Dim, operand

ALONG = "it works along the token axis"
COMPUTED = "its axes are computed"
AGAINST = "its inputs count tokens along different axes"
NUMBERED = "it numbers tokens by their place in the step"


@dataclass(frozen=True)
class Rows:
    """A node with its token axes: of each input (None where it has none), and of its outputs."""

    node: gs.Node
    axes: tuple[int | None, ...]
    out: int

    def shape(self, index: int) -> list[Dim]:
        return list(self.node.inputs[index].shape or ())

    @property
    def rank(self) -> int:
        return len(self.node.outputs[0].shape or ())

    @property
    def first(self) -> int | None:
        return self.axes[0]

    def axis(self, default: int, rank: int) -> int:
        """The attribute `axis`, counted from the front."""
        return int(self.node.attrs.get("axis", default)) % rank

    def alone(self) -> str | None:
        """A reason where any input but the first counts tokens."""
        return AGAINST if any(a is not None for a in self.axes[1:]) else None


Rule = Callable[[Rows], str | None]


def kept(rows: Rows, axis: int | None, moved: int = 0) -> str | None:
    """None where the token axis `axis` of the input is the output's, `moved` by axes that come or go before it."""
    return None if axis is not None and axis + moved == rows.out else "it moves the token axis in an unknown way"


def broadcast(rows: Rows, among: Sequence[int] | None = None) -> str | None:
    """Inputs meet aligned at their last axes: all count tokens at the same place, or are the same for all tokens."""
    from_end = rows.out - rows.rank
    for i in range(len(rows.axes)) if among is None else among:
        if operand(rows.node, i) is None:
            continue
        shape, axis = rows.shape(i), rows.axes[i]
        if axis is not None:
            if axis - len(shape) != from_end:
                return AGAINST
        elif len(shape) >= -from_end and shape[from_end] != 1:
            return f"input {i} has a row of its own for each of {shape[from_end]} tokens"
    return None
