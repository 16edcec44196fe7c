"""The shapes that steps run in: decode steps are padded to few batch sizes, so that each is captured once and replayed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

FREE_ROWS = 64
"""Rows up to which a product of today's GPUs reads weights for as long as it computes, so that padding costs nothing."""


@dataclass(frozen=True)
class StepShape:
    """What fixes a step's launches: a captured step can be replayed for every step of its shape."""

    tokens: int
    batch: int
    rows: int
    """Rows of logits, at least one."""
    decode: bool
    """No sequence has more than one new token. Such steps are padded: `tokens`, `batch` and `rows` are the bucket."""
    table_width: int
    """Blocks in a row of the block table."""
    splits: tuple[int, ...] = ()
    """Programs that share a decoding sequence's keys, for each kind of attention layer."""


def decode_buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 up to 32, every 16 up to 128, every 32 beyond; and the largest batch itself."""
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, max_batch + 1, 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)


def bucket_for(batch: int, buckets: Sequence[int], own: Sequence[int] = ()) -> int:
    """What a decode step of `batch` sequences is padded to: the next of `buckets`, both ascending.

    own: buckets whose kernels were chosen for just that size. The next of these is better where the padding is free.
    """
    at = bisect_left(own, batch)
    if at < len(own) and own[at] <= max(FREE_ROWS, batch):
        return own[at]
    return buckets[bisect_left(buckets, batch)]


def round_down(splits: int) -> int:
    """The power of two not above `splits`: a context that grows then needs few captures."""
    return 1 << (splits.bit_length() - 1) if splits else 0


def table_width(blocks: int, most: int) -> int:
    """Columns of a block table that holds `blocks`: a power of two, or `most`."""
    return min(most, 1 << max(0, blocks - 1).bit_length())
