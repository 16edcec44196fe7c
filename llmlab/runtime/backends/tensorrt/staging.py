"""A step's integers on their way to the GPU: page-locked memory that the host fills, and one copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmlab.cuda import DeviceBuffer, PinnedArray, Stream, copy_async
from llmlab.runtime.backends.tensorrt.buckets import StepShape
from llmlab.runtime.batch import SamplingBatch, StepBatch

WORD = 4  # bytes of every number here
_ALIGN = 64  # words, so that every field starts at a multiple of 256 bytes
SETS = 2
"""Steps that may be in flight."""
_FLOATS = ("temperature", "top_p", "min_p", "uniform")
SAMPLING = (*_FLOATS, "top_k")


class Staging:
    """Fields of int32 or float32 that lie at the same place in every step, on the host (`SETS` times) and on the GPU.

    The block table comes last: only the rows and columns that a step uses are copied.
    """

    def __init__(self, max_tokens: int, max_batch: int, max_blocks: int) -> None:
        sizes = {
            "input_ids": max_tokens,
            "position_ids": max_tokens,
            "query_start": max_batch + 1,
            "kv_len": max_batch,
            "logits_index": max_batch,
            **dict.fromkeys(SAMPLING, max_batch),
            "block_table": max_batch * max_blocks,
        }
        self._at: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self._at[name] = slice(end, end + size)
            end += -(-size // _ALIGN) * _ALIGN
        self._host = [PinnedArray(end, np.int32) for _ in range(SETS)]
        self._device = DeviceBuffer(end * WORD, "a step's integers")
        self.addresses = {name: self._device.pointer + at.start * WORD for name, at in self._at.items()}

    def fill(
        self,
        which: int,
        batch: StepBatch,
        logits_index: NDArray[np.int64],
        shape: StepShape,
        sampling: SamplingBatch | None = None,
    ) -> int:
        """Write a step, padded to `shape`, into host set `which`; gives how many bytes there are to copy.

        Sequences that pad a step have no new token (query_start stays) and no keys; rows that pad it are token 0.
        """
        tokens, batch_size = len(batch.input_ids), len(batch.kv_len)
        self._put(which, "input_ids", batch.input_ids, shape.tokens)
        self._put(which, "position_ids", batch.position_ids, shape.tokens)
        self._put(which, "logits_index", logits_index, shape.rows)
        self._put(which, "kv_len", batch.kv_len, shape.batch)
        self._put(which, "query_start", batch.query_start, shape.batch + 1, fill=tokens)
        if sampling is not None:
            for name in SAMPLING:
                self._put(which, name, getattr(sampling, name), shape.rows)
        at = self._at["block_table"].start
        table = self._host[which].array[at : at + shape.batch * shape.table_width].reshape(shape.batch, -1)
        width = min(shape.table_width, batch.block_table.shape[1])
        table[:batch_size, :width] = batch.block_table[:, :width]
        table[:batch_size, width:] = -1
        table[batch_size:] = -1
        return int(at + table.size) * WORD

    def copy(self, which: int, nbytes: int, stream: Stream) -> None:
        copy_async(self._device.pointer, self._host[which].pointer, nbytes, stream)

    def free(self) -> None:
        self._device.free()

    def _put(self, which: int, name: str, values: NDArray[Any], size: int, fill: int = 0) -> None:
        field = self._host[which].array[self._at[name]]
        if name in _FLOATS:
            field = field.view(np.float32)
        field[: len(values)] = values
        field[len(values) : size] = fill
