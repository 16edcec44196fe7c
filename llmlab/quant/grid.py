"""Rounding to a grid of few numbers, in plain NumPy: what a quantized weight is, and which scale it gets.

A number q of the grid stands for (q − zero_point) · scale. Shapes: a weight is [N, K], N outputs and K inputs. A scale is
shared by a row ([N]), by `group` numbers of a row that lie side by side ([N, K / group]), or by the whole matrix ([]).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
GROUPS = (16, 32, 64, 128, 256)
_RANGES = {"int8": (-128, 127), "int4": (-8, 7), "int3": (-4, 3), "fp8": (-448, 448)}
DTYPES = tuple(_RANGES)
_STRIP = 1 << 22  # numbers rounded together: what is in memory beside the weight and the result
_LEAST = float(np.finfo(np.float32).tiny)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """The numbers that a value may have, and which values share a scale.

    dtype: int8, int4, int3 (−4…3) or fp8 (E4M3). group: numbers of a row that share a scale; 0: as `per` says.
    symmetric: zero is the middle of the grid, so that there is no zero point. per: `channel` (a scale a row) or `tensor`.
    """

    dtype: str
    group: int = 0
    symmetric: bool = True
    per: str = "channel"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; available: {', '.join(_RANGES)}")
        if self.group not in (0, *GROUPS) or isinstance(self.group, bool):
            raise InputError(f"group is {self.group!r}; available: 0 (a scale a row), {', '.join(map(str, GROUPS))}")
        if self.per not in ("channel", "tensor"):
            raise InputError(f"per is {self.per!r}; available: channel, tensor")
        if self.group and self.per == "tensor":
            raise InputError(f"group is {self.group} and per is 'tensor': give one of the two")
        if self.dtype == "fp8" and not self.symmetric:
            raise InputError("fp8 has no zero point: leave symmetric=True")

    @property
    def low(self) -> int:
        """The least number of the grid."""
        return _RANGES[self.dtype][0]

    @property
    def high(self) -> int:
        return _RANGES[self.dtype][1]

    @property
    def stored(self) -> np.dtype:
        """The type that a graph stores the numbers in: int3 lies in four bits."""
        return {"int8": np.dtype(np.int8), "fp8": FP8}.get(self.dtype, np.dtype(ml_dtypes.int4))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight [N, K]. Raises InputError where the groups don't come out even."""
        rows, depth = shape
        if self.per == "tensor":
            return ()
        if not self.group:
            return (rows,)
        if depth % self.group:
            fit = [g for g in GROUPS if depth % g == 0]
            wanted = f"choose group {' or '.join(map(str, fit))}, or 0" if fit else "choose 0, a scale a row"
            raise InputError(f"rows of {depth} numbers don't divide into groups of {self.group}: {wanted}")
        return (rows, depth // self.group)

    def scales(self, weight: np.ndarray) -> tuple[Floats, NDArray[np.int8] | None]:
        """The scale of each group of a weight [N, K], from its least and largest number, and the zero point (None: symmetric).

        A group of zeros has scale 1. Raises InputError for a NaN or an infinity.
        """
        blocks = self._blocks(np.asarray(weight))
        most, least = (np.asarray(f(blocks, -1), np.float32) for f in (np.max, np.min))
        if not (np.isfinite(most).all() and np.isfinite(least).all()):
            raise InputError("holds a NaN or an infinity")
        return self.between(least, most)

    def between(self, least: np.ndarray, most: np.ndarray) -> tuple[Floats, NDArray[np.int8] | None]:
        """The scale and the zero point (None: symmetric) with which the grid reaches from `least` to `most`, of any one shape."""
        if self.symmetric:
            return _not_zero(np.maximum(most, -least) / np.float32(self.high)), None
        least, most = np.minimum(least, 0), np.maximum(most, 0)  # zero is a number of the grid
        scale = _not_zero(most / np.float32(self.high - self.low) - least / np.float32(self.high - self.low))
        zero = np.clip(np.rint(np.float32(self.low) - least / scale), self.low, self.high)
        return scale, zero.astype(np.int8)

    def quantize(
        self, weight: np.ndarray, scale: np.ndarray | None = None, zero_point: np.ndarray | None = None
    ) -> Rounded:
        """Round a weight [N, K] to nearest (ties to even), what is beyond the grid to its end.

        scale, zero_point: those to use, in the shape that `scale_shape` gives; default: `scales` of the weight.
        Raises InputError for a NaN or an infinity in the weight, or where groups don't come out even.
        """
        weight = np.asarray(weight)
        if scale is None:
            scale, zero_point = self.scales(weight)
        scale = np.asarray(scale, np.float32).reshape(self.scale_shape(weight.shape))
        zero = None if self.symmetric else np.asarray(zero_point, np.int8).reshape(scale.shape)
        values = np.empty(weight.shape, FP8 if self.dtype == "fp8" else np.int8)
        rows = max(1, _STRIP // max(1, weight.shape[1]))
        for begin in range(0, len(weight), rows):
            part = slice(begin, begin + rows)
            strip = weight[part].astype(np.float32)
            if not np.isfinite(strip).all():
                raise InputError("holds a NaN or an infinity")
            offset = None if zero is None else self._spread(zero.astype(np.float32), weight.shape, part)
            values[part] = self.nearest(strip / self._spread(scale, weight.shape, part), offset)
        return Rounded(self, values, scale, zero)

    def nearest(self, scaled: np.ndarray, zero: np.ndarray | None = None) -> np.ndarray:
        """The numbers of the grid that are nearest to those of a weight over their scale; integers as float32."""
        if self.dtype == "fp8":
            return np.clip(scaled, self.low, self.high).astype(FP8)
        found = np.rint(scaled)
        if zero is not None:
            found += zero
        return np.clip(found, self._lowest, self.high, out=found)

    @property
    def _lowest(self) -> int:
        """int8 without a zero point keeps to −127…127, as accelerators have it; fewer bits use all that they have."""
        return -127 if self.symmetric and self.dtype == "int8" else self.low

    def _blocks(self, weight: np.ndarray) -> np.ndarray:
        """[N, K] → [*scale_shape, numbers that share a scale]."""
        return weight.reshape(*self.scale_shape(weight.shape), -1) if weight.size else np.zeros((1, 1), np.float32)

    def _spread(self, scale: np.ndarray, shape: tuple[int, ...], rows: slice = slice(None)) -> np.ndarray:
        """Scales in a shape that multiplies rows of a weight [N, K]."""
        if self.per == "tensor":
            return scale
        return np.repeat(scale[rows], self.group, 1) if self.group else scale[rows, None]


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight on a grid: `values` [N, K] as int8 (also where the grid has fewer bits) or float8_e4m3fn, `scale` float32 and
    `zero_point` int8 or None, both in the shape that `Grid.scale_shape` gives."""

    grid: Grid
    values: np.ndarray
    scale: Floats
    zero_point: NDArray[np.int8] | None = None

    def dequantize(self) -> Floats:
        """What the numbers stand for, float32 [N, K]."""
        values, shape = self.values.astype(np.float32), self.values.shape
        if self.zero_point is not None:
            values -= self.grid._spread(self.zero_point.astype(np.float32), shape)
        return values * self.grid._spread(self.scale, shape)


def _not_zero(scale: np.ndarray) -> Floats:
    """Scales; 1 where all numbers are zero, or so small that their scale is no ordinary float32."""
    return np.where(scale >= _LEAST, scale, np.float32(1)).astype(np.float32)
