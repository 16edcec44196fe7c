"""What is in a weight: a sample of its numbers, their histogram, and the error that quantizing made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.quantized import QuantizedWeight
from llmlab.graph.store.deferred import DeferredValues, Packed
from llmlab.graph.store.packed import unpack
from llmlab.graph.store.storage import loaded

SAMPLE = 1 << 20
"""Numbers that are looked at, of a larger weight in pieces from all over it."""
_PIECES = 16
BINS = 48


@dataclass(frozen=True)
class Histogram:
    """counts [bins] between edges [bins + 1] of the numbers looked at, which are not all of `total` where `sampled`.

    integers: each bin is one integer. Numbers that aren't finite are counted apart.
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    looked_at: int
    total: int
    low: float
    high: float
    mean: float
    std: float
    zeros: int
    not_finite: int
    integers: bool

    @property
    def sampled(self) -> bool:
        return self.looked_at < self.total


def histogram(sample: NDArray[np.generic], total: int) -> Histogram:
    """Of an array of any shape and type; `total`: of how many numbers it is a sample."""
    integers = np.dtype(sample.dtype).kind in "iub" or np.dtype(sample.dtype).name in ("int4", "uint4")
    flat = np.asarray(sample).reshape(-1).astype(np.float32)
    finite = flat[np.isfinite(flat)]
    if not finite.size:
        none: NDArray[np.int64] = np.zeros(0, np.int64)
        return Histogram(none, np.zeros(1), flat.size, total, 0, 0, 0, 0, 0, flat.size, integers)
    low, high = float(finite.min()), float(finite.max())
    if integers and high - low < 256:
        edges = np.arange(low - 0.5, high + 1)
    else:
        room = 0.0 if high > low else max(abs(low), 1.0) * 0.5
        edges = np.linspace(low - room, high + room, BINS + 1)
    counts, _ = np.histogram(finite, edges)
    mean, std = float(finite.mean(dtype=np.float64)), float(finite.std(dtype=np.float64))
    zeros = int((finite == 0).sum())
    return Histogram(counts, edges, flat.size, total, low, high, mean, std, zeros, flat.size - finite.size, integers)


def is_slow(constant: gs.Constant) -> bool:
    """Whether looking into a constant computes it whole, and it is large."""
    values = constant._values
    return isinstance(values, DeferredValues) and not isinstance(values, Packed) and int(np.prod(values.shape)) > SAMPLE


def sample(constant: gs.Constant, limit: int = SAMPLE) -> NDArray[np.generic]:
    """At most about `limit` of a constant's numbers, from all over it; one piece of a memory map is read at a time."""
    values = constant._values
    if isinstance(values, DeferredValues) and not isinstance(values, Packed):
        values = values.load()
    total = int(np.prod(values.shape, dtype=np.int64))
    if total <= limit:
        return np.asarray(loaded(values)).reshape(-1)
    piece = limit // _PIECES & ~1
    starts = [(total - piece) * i // (_PIECES - 1) & ~1 for i in range(_PIECES)]
    if isinstance(values, Packed):
        packed = np.asarray(values.packed).reshape(-1)
        parts = [unpack(packed[s // 2 : (s + piece) // 2], (piece,), values.dtype) for s in starts]
    else:
        flat = np.asarray(values).reshape(-1)
        parts = [np.array(flat[s : s + piece]) for s in starts]
    return np.concatenate(parts)


def sample_quantized(weight: QuantizedWeight, limit: int = SAMPLE) -> NDArray[np.float32]:
    """What a sample of a quantized weight's integers stands for: whole rows, from all over it."""
    parts = [part.dequantize().reshape(-1) for part, _ in pieces(weight, limit)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def pieces(weight: QuantizedWeight, limit: int | None = None) -> Iterator[tuple[QuantizedWeight, slice]]:
    """A quantized weight in pieces of rows (of its first axis), with the rows that each is; at most `limit` numbers of it."""
    shape = weight.shape
    rows, width = (shape[0], int(np.prod(shape[1:], dtype=np.int64))) if shape else (1, 1)
    step = weight.block if weight.block and weight.axis == 0 else 1
    if not shape or rows * width <= (limit or SAMPLE):
        yield weight, slice(0, rows)
        return
    take = max((limit or SAMPLE * _PIECES) // _PIECES // width // step, 1) * step
    count = -(-rows // take)
    wanted = count if limit is None else min(count, _PIECES, max(limit // (take * width), 1))
    chosen = sorted({(count - 1) * i // max(wanted - 1, 1) for i in range(wanted)})
    for at in chosen:
        here = slice(at * take, min((at + 1) * take, rows))
        yield _rows(weight, here), here


def _rows(weight: QuantizedWeight, here: slice) -> QuantizedWeight:
    """Rows of a quantized weight; `here` begins and ends between groups."""

    def cut(tensor: gs.Constant, rows: slice) -> gs.Constant:
        values = tensor._values
        if isinstance(values, Packed):
            width = int(np.prod(values.shape[1:], dtype=np.int64))
            if width % 2 == 0:
                packed = np.asarray(values.packed).reshape(-1)[rows.start * width // 2 : rows.stop * width // 2]
                shape = (rows.stop - rows.start, *values.shape[1:])
                return gs.Constant(tensor.name, Packed(packed, shape, values.dtype))
        return gs.Constant(tensor.name, np.asarray(loaded(values))[rows])

    scales = here
    if weight.block and weight.axis == 0:
        scales = slice(here.start // weight.block, -(-here.stop // weight.block))
    along = bool(weight.block) or weight.axis == 0  # whether scales belong to rows
    scale, zero = (
        t if t is None or weight.per_tensor or not along else cut(t, scales) for t in (weight.scale, weight.zero_point)
    )
    assert scale is not None
    return replace(weight, values=cut(weight.values, here), scale=scale, zero_point=zero)
