"""What an attention mask is, found out by evaluating it: causal, with a window, with ALiBi, or something else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.analysis.evaluate import CannotEvaluate, PositionFunction
from llmlab.graph.edit import value

_LENGTHS = (1, 2, 7, 33, 130, 1024)
_BATCHED = 130  # tokens; up to here two sequences are asked about at once
_HIDDEN = -1e4  # what is added to the score of a key that isn't seen, or less
_BIAS = "the mask adds numbers to the scores that are not ALiBi"
_LONGEST = 8192  # tokens; nothing longer is asked about: a mask is that large squared


@dataclass(frozen=True)
class MaskKind:
    """What a causal mask does beyond that, or the `reason` why it is none that can be paged."""

    window: int = 0
    """Keys a query sees, itself included; 0 for all before it."""
    slopes: tuple[float, ...] = ()
    """ALiBi: slope · (key − query) is added to a head's scores; one for each head, or one for all; empty for none."""
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
    window, slopes = 0, np.zeros(0)
    for length in sorted(n for n in lengths if 0 < n <= min(max_length, _LONGEST + 2)):
        seen = _look(function, length)
        if isinstance(seen, str):
            return MaskKind(reason=seen)
        last = int(seen.visible[-1].sum())
        if last < length:
            window = window or last
        if not np.array_equal(seen.visible, _expected(length, window)):
            return MaskKind(reason=_describe(seen.visible, length))
        if length == 1:
            continue  # one key alone: whatever is added to it changes nothing
        found = _slopes(seen)
        if isinstance(found, str):
            return MaskKind(reason=found)
        if slopes.size and not np.allclose(found, slopes, rtol=1e-4, atol=1e-9):
            return MaskKind(reason=f"{_BIAS} (it changes with the sequence's length)")
        slopes = found
    return MaskKind(window, tuple(float(s) for s in slopes) if slopes.any() else ())


def _turning_points(function: PositionFunction) -> set[int]:
    """Integer constants of the mask's arithmetic, and the sizes of the masks it holds ready."""
    constants = {id(t): t for n in function.nodes for t in n.inputs if isinstance(t, gs.Constant)}.values()
    sizes = {int(d) for t in constants if len(t.shape) > 1 for d in t.shape[-2:]}
    arrays = [a for t in constants if (a := value(t)) is not None and a.size == 1]
    numbers = {abs(int(a.reshape(()))) for a in arrays if a.dtype.kind in "iu"}
    # Negative floats are what hidden keys get added.
    floats = {float(a.reshape(())) for a in arrays if a.dtype.kind == "f"}
    return {n for n in sizes | numbers | {int(f) for f in floats if np.isfinite(f) and f == int(f)} if n > 1}


@dataclass(frozen=True)
class _Seen:
    """A mask at one length: which keys each query sees, [query, key], and what is added to them, [heads or 1, query, key]."""

    visible: NDArray[np.bool_]
    bias: NDArray[np.floating] | None


def _look(function: PositionFunction, length: int) -> _Seen | str:
    """The mask of one sequence of `length` tokens, if a batch of two has the same; or why there is none."""
    batch = 2 if length <= _BATCHED else 1
    try:
        (mask,) = function(np.tile(np.arange(length), (batch, 1)))
    except CannotEvaluate as problem:
        return f"the mask can't be evaluated for {length} tokens ({problem})"
    if not 2 <= mask.ndim <= 4 or mask.shape[-2:] not in ((length, length), (1, length)):
        return f"the mask has shape {list(mask.shape)} for {length} tokens"
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    hidden = ~mask if mask.dtype == np.bool_ else mask <= _HIDDEN
    if not (hidden == hidden[:1, :1]).all() or not (mask == mask[:1]).all():
        return "the mask differs between heads or sequences"
    visible = np.broadcast_to(~hidden[0, 0], (length, length))
    return _Seen(visible, None if mask.dtype == np.bool_ or not mask[0][~hidden[0]].any() else mask[0])


def _slopes(seen: _Seen) -> NDArray[np.float64] | str:
    """The slope of each head where what is added is linear in the key's position, up to a constant for each query."""
    if seen.bias is None:
        return np.zeros(1)
    length = len(seen.visible)
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    first = int(np.argmax(seen.visible[-1]))  # the farthest key that the last query sees
    slopes = []
    for bias in np.broadcast_to(seen.bias, (len(seen.bias), length, length)):
        relative = np.where(seen.visible, bias - np.diagonal(bias)[:, None], 0.0).astype(np.float64)
        slope = relative[-1, first] / (first - length + 1) if first < length - 1 else 0.0
        rounding = 4 * np.finfo(bias.dtype).eps * float(np.abs(np.where(seen.visible, bias, 0)).max())
        if np.abs(relative - np.where(seen.visible, slope * (key - query), 0)).max() > rounding:
            return f"{_BIAS} (at {length} tokens it is not linear in the key's position)"
        slopes.append(slope)
    return np.array(slopes)


def _expected(length: int, window: int) -> NDArray[np.bool_]:
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    return (key <= query) & (key > query - (window or length))


def _describe(visible: NDArray[np.bool_], length: int) -> str:
    if visible.all() and length > 1:
        return "attention is bidirectional; only causal self-attention can be paged"
    if np.triu(visible, 1).any():
        return "the mask lets tokens see later ones; only causal self-attention can be paged"
    size = int(np.argmin(visible[:, 0])) or length
    at = np.arange(length)
    if np.array_equal(visible, _expected(length, 0) & (at[:, None] // size == at // size)):
        return f"attention stays within chunks of {size} tokens, which can't be paged"
    return f"the mask is neither causal nor a window (at {length} tokens)"
