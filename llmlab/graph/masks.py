"""What an attention mask is, found out by evaluating it: causal, causal with a window, or something else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.edit import value
from llmlab.graph.evaluate import CannotEvaluate, PositionFunction

_LENGTHS = (1, 2, 7, 33, 130, 1024)
_BATCHED = 130  # tokens; up to here two sequences are asked about at once
_LONGEST = 8192  # tokens; nothing longer is asked about: a mask is that large squared


@dataclass(frozen=True)
class MaskKind:
    """`window` keys a query sees, itself included (0: all before it); or the `reason` why the mask is neither."""

    window: int = 0
    reason: str | None = None


def classify(mask: gs.Tensor, max_length: int) -> MaskKind:
    """Evaluate `mask` (a boolean or additive float input of Attention) at several lengths and name what it is.

    A window is looked for at every integer constant in the mask's arithmetic and at the size of every stored mask:
    those are the lengths at which a windowed mask starts to differ from a causal one. Lengths stay within
    `max_length`, and a mask with such a length beyond what can be probed is not named.
    """
    function = PositionFunction([mask])
    if (reason := function.dependence()) is not None:
        return MaskKind(reason=f"the mask {reason}")
    turns = _turning_points(function)
    if far := [n for n in turns if _LONGEST < n <= max_length]:
        return MaskKind(reason=f"the mask may change at {min(far)} tokens, and it was looked at up to {_LONGEST} only")
    lengths = {*_LENGTHS, *(n + d for n in turns for d in (0, 1, 2))}
    window: int | None = None
    for length in sorted(n for n in lengths if 0 < n <= min(max_length, _LONGEST + 2)):
        visible = _visible(function, length)
        if isinstance(visible, str):
            return MaskKind(reason=visible)
        last = int(visible[-1].sum())
        if last < length:
            window = last if window is None else window
        if not np.array_equal(visible, _expected(length, window)):
            return MaskKind(reason=_describe(visible, length))
    return MaskKind(window=window or 0)


def _turning_points(function: PositionFunction) -> set[int]:
    """Integer constants of the mask's arithmetic, and the sizes of the masks it holds ready."""
    constants = {id(t): t for n in function.nodes for t in n.inputs if isinstance(t, gs.Constant)}.values()
    sizes = {int(d) for t in constants if len(t.shape) > 1 for d in t.shape[-2:]}
    arrays = [a for t in constants if (a := value(t)) is not None and a.size == 1]
    numbers = {abs(int(a.reshape(()))) for a in arrays if a.dtype.kind in "iu"}
    # Negative floats are what hidden keys get added.
    floats = {float(a.reshape(())) for a in arrays if a.dtype.kind == "f"}
    return {n for n in sizes | numbers | {int(f) for f in floats if np.isfinite(f) and f == int(f)} if n > 1}


def _visible(function: PositionFunction, length: int) -> NDArray[np.bool_] | str:
    """[query, key] of one sequence, the same for a batch of two and all heads; or why it isn't."""
    batch = 2 if length <= _BATCHED else 1
    try:
        (mask,) = function(np.tile(np.arange(length), (batch, 1)))
    except CannotEvaluate as problem:
        return f"the mask can't be evaluated for {length} tokens ({problem})"
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
