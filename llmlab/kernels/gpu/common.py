"""What the attention kernels share: scores in base 2, softcap, masks, and where a key lies in the block pool."""

from __future__ import annotations

from llmlab.errors import require

triton = require("triton", "tensorrt")
tl = require("triton.language", "tensorrt")
cuda = require("triton.language.extra.cuda", "tensorrt")
gdc_wait, gdc_launch_dependents = cuda.gdc_wait, cuda.gdc_launch_dependents

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def start_early(EARLY: tl.constexpr):
    """First of all in a kernel: let the next one's programs start as soon as there is room for them, then wait until the one before is over.

    A launch's latency passes while the kernel before is still at work (programmatic dependent launch, sm_90 and later).
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def find_sequence(query_start, tile, num_seqs, TILE: tl.constexpr):
    """The sequence whose query tiles `tile` belongs to, where sequence b's first tile is query_start[b] // TILE + b.

    Every sequence gets one tile more than its full ones, so tiles of a ragged step are numbered without a prefix sum.
    """
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TILE + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def score(q, k, scale2, SOFTCAP: tl.constexpr):
    """q·kᵀ in base-2 units: softmax(x) = exp2(x · log2 e)/…; `scale2` holds scale · log2 e, SOFTCAP is in natural units."""
    return softcapped(tl.dot(q, k) * scale2, SOFTCAP)


@triton.jit
def softcapped(s, SOFTCAP: tl.constexpr):
    """Scores in base-2 units, held within SOFTCAP (natural units) by a tanh; as they are where it is 0."""
    if SOFTCAP > 0:
        capped = SOFTCAP * LOG2E
        s = capped * (2 * tl.sigmoid(2 * s / capped) - 1)  # tanh
    return s


@triton.jit
def block_rows(
    block_table, keys, length, head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Offset (elements) in a pool half [blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM] of each of `keys` of one sequence."""
    block = tl.load(block_table + keys // BLOCK_SIZE, mask=keys < length, other=0).to(tl.int64)
    return ((block * KV_HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE) * HEAD_DIM
