"""What a step brought, on its way back to the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmlab.cuda import Event, PinnedArray, Stream, copy_async
from llmlab.errors import EngineError
from llmlab.runtime.batch import StepResult

_WORD = 4  # bytes


class Results:
    """Page-locked memory for one step's tokens and logits, and the event that says when they are there."""

    def __init__(self, max_batch: int, vocab: int) -> None:
        self._vocab = vocab
        self._tokens = PinnedArray(max_batch, np.int32)
        self._logits: PinnedArray | None = None  # large, and mostly not asked for
        self._done = Event()
        self._under_way = False
        self.num_tokens = self.num_logits = 0

    def fetch_tokens(self, source: int, count: int, stream: Stream) -> None:
        copy_async(self._tokens.pointer, source, count * _WORD, stream)
        self.num_tokens = count

    def fetch_logits(self, source: int, rows: NDArray[np.integer], stream: Stream) -> None:
        """Of the float32 [N, vocab] at `source`, the given rows; those that follow each other in one copy."""
        self.num_logits = len(rows)
        if not len(rows):
            return
        row = self._vocab * _WORD
        if self._logits is None or len(self._logits.array) < len(rows):
            self._logits = PinnedArray((len(rows), self._vocab), np.float32)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            copy_async(
                self._logits.pointer + int(start) * row, source + int(rows[start]) * row, int(end - start) * row, stream
            )

    def finish(self, stream: Stream) -> None:
        self._done.record(stream)
        self._under_way = True

    def wait(self) -> None:
        """Until the step that filled it last is over."""
        if self._under_way:
            self._done.synchronize()
            self._under_way = False

    def tokens(self) -> NDArray[np.int32]:
        return self._tokens.array[: self.num_tokens]

    def logits(self) -> NDArray[np.float32]:
        if self._logits is None or not self.num_logits:
            return np.empty((0, self._vocab), np.float32)
        return self._logits.array[: self.num_logits]


class Submitted:
    """Implements `Pending`."""

    def __init__(self, results: Results, told: Callable[[EngineError], EngineError]) -> None:
        self._results = results
        self._told = told
        self._error: EngineError | None = None

    def result(self) -> StepResult:
        if self._error is not None:
            raise self._error
        try:
            self._results.wait()
        except EngineError as error:
            self._error = self._told(error)
            raise self._error from error
        return StepResult(self._results.tokens(), self._results.logits())
