"""How quantized weights lie in memory for the product kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmlab.kernels.gpu.launch_product import ProductKind


def pack_weight(kind: ProductKind, values: NDArray[np.int8]) -> NDArray[np.int8]:
    """Integers [N, depth] of any rows of a weight of this kind as its kernels read them: int8 [N, depth], or [N, depth / 2] for int4.

    Beside x of 16 bits, a word of 16 bits holds columns that are 8 apart, the first in its low bits: words i = 0 … 7 of a block hold the
    columns i, i + 8 (int8: a block has 16 columns) or i, i + 8, i + 16, i + 24 (int4: 32 columns). So what a thread unpacks for one place
    of 8 neighbouring words meets 8 neighbouring values of x. Where x is int8 too, the columns stay in their order.
    """
    if kind.x:
        return values
    places = 16 // kind.bits
    blocks = values.reshape(len(values), kind.depth // (8 * places), places, 8).astype(np.int16)
    words = np.zeros((*blocks.shape[:2], 8), np.int16)
    for place in range(places):
        words |= (blocks[:, :, place] & ((1 << kind.bits) - 1)) << (kind.bits * place)
    return words.reshape(len(values), -1).view(np.int8)
