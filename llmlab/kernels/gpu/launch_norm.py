"""How rows are normalized: which kernel, how many warps. Plain integers, no GPU library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmlab.errors import InputError
from llmlab.kernels.gpu.geometry import Launch, power_of_two

FLOATS = ("float16", "bfloat16", "float32")
MOST_WIDTH = 1 << 15
"""Columns of a row that one program holds in registers."""


@dataclass(frozen=True)
class NormKind:
    """out [rows, width] = x / sqrt(mean(x²) + epsilon) · weight, by row. Raises InputError for what there is no kernel for."""

    width: int
    """A multiple of 16, at most 32768."""
    dtype: str
    """Of x: float16, bfloat16 or float32."""
    out_dtype: str
    weight_dtype: str
    epsilon: float

    def __post_init__(self) -> None:
        types = {self.dtype, self.out_dtype, self.weight_dtype}
        if not types <= set(FLOATS) or self.width % 16 or not 0 < self.width <= MOST_WIDTH or not self.epsilon >= 0:
            raise InputError(
                f"no kernel for {self}: expected a width that is a multiple of 16 up to {MOST_WIDTH}, and tensors of {', '.join(FLOATS)}"
            )

    @property
    def labels(self) -> dict[str, Any]:
        """What tells a compiled kernel from others of its name."""
        types = {"DTYPE": self.dtype, "OUT_DTYPE": self.out_dtype, "WEIGHT_DTYPE": self.weight_dtype}
        return {**launch(self, 1).constants, **types}


def launch(kind: NormKind, rows: int) -> Launch:
    """`rms_norm` for `rows` rows: a thread holds up to 16 columns, 32 of the widest."""
    pad = power_of_two(kind.width)
    return Launch({"WIDTH_PAD": pad}, {"num_warps": min(32, max(1, pad // 512))}, (rows,))
