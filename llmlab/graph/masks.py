"""What an attention mask is, found out by evaluating it: causal, causal with a window, or something else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.edit import value
from llmlab.graph.evaluate import PositionFunction

_LENGTHS = (1, 2, 7, 33, 130)
_LONGEST = 8192  # tokens; a window constant beyond that is not probed at its edge


@dataclass(frozen=True)
class MaskKind:
    """`window` keys a query sees, itself included (0: all before it); or the `reason` why the mask is neither."""

    window: int = 0
    reason: str | None = None


def classify(mask: gs.Tensor, max_length: int) -> MaskKind:
    """Evaluate `mask` (a boolean or additive float input of Attention) at several lengths and name what it is.

    A window is looked for at every integer constant in the mask's arithmetic: those are the lengths at which a
    windowed mask starts to differ from a causal one. Lengths stay below `max_length` + 2.
    """
    function = PositionFunction([mask])
    if (reason := function.dependence()) is not None:
        return MaskKind(reason=f"the mask {reason}")
    constants = {
        abs(int(v))
        for n in function.nodes
        for t in n.inputs
        if (a := value(t)) is not None and a.size == 1 and _whole(a)
        for v in a.reshape(-1)
    }
    edges = {c + d for c in constants if 1 < c <= min(_LONGEST, max_length) for d in (0, 1, 2)}
    window: int | None = None
    for length in sorted({*_LENGTHS, *edges}):
        visible = _visible(function, length)
        if isinstance(visible, str):
            return MaskKind(reason=visible)
        last = int(visible[-1].sum())
        if last < length:
            window = last if window is None else window
        if not np.array_equal(visible, _expected(length, window)):
            return MaskKind(reason=_describe(visible, length))
    return MaskKind(window=window or 0)


def _whole(array: np.ndarray) -> bool:
    return array.dtype.kind in "iu"


def _visible(function: PositionFunction, length: int) -> NDArray[np.bool_] | str:
    """[query, key] of one sequence, the same for a batch of two and all heads; or why it isn't."""
    batch = 2 if length <= max(_LENGTHS) else 1
    (mask,) = function(np.tile(np.arange(length), (batch, 1)))
    if mask.ndim < 2 or mask.shape[-2:] != (length, length):
        return f"the mask has shape {list(mask.shape)} for {length} tokens"
    flat = mask.reshape(-1, length, length)
    if mask.dtype != np.bool_:
        hidden = flat <= -1e4
        if not np.all((flat == 0) | hidden):
            return "the mask adds numbers to the scores (a position bias)"
        flat = ~hidden
    if not (flat == flat[0]).all():
        return "the mask differs between heads or sequences"
    return flat[0]


def _expected(length: int, window: int | None) -> NDArray[np.bool_]:
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    return (key <= query) & (key > query - (window or length))


def _describe(visible: NDArray[np.bool_], length: int) -> str:
    if visible.all() and length > 1:
        return "attention is bidirectional; only causal self-attention can be paged"
    if np.triu(visible, 1).any():
        return "the mask lets tokens see later ones; only causal self-attention can be paged"
    return f"the mask is neither causal nor a window (at {length} tokens)"
