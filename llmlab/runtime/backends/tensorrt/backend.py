"""`Backend` and `Pipelined` over TensorRT parts and our kernels: two steps in flight on one stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmlab.cuda import Device, Stream, copy_async
from llmlab.errors import EngineError, GpuLostError, InputError
from llmlab.runtime.backends.tensorrt.buckets import StepShape, bucket_for, decode_buckets, table_width
from llmlab.runtime.backends.tensorrt.executor import Executor
from llmlab.runtime.backends.tensorrt.memory import KVPool
from llmlab.runtime.backends.tensorrt.profile import StepProfile, decode_batch, measure
from llmlab.runtime.backends.tensorrt.results import Results, Submitted
from llmlab.runtime.backends.tensorrt.staging import SETS, Staging
from llmlab.runtime.backends.tensorrt.tokens import Tokens
from llmlab.runtime.batch import EngineLimits, SamplingBatch, StepBatch


class TensorRTBackend:
    """Implements `Pipelined`. One thread at a time calls, whichever."""

    def __init__(
        self,
        device: Device,
        stream: Stream,
        limits: EngineLimits,
        max_batch: int,
        executor: Executor,
        pool: KVPool,
        staging: Staging,
        tokens: Tokens,
        own_buckets: Sequence[int],
    ) -> None:
        self.limits = limits
        self.max_batch = max_batch
        self.device = device
        self.executor = executor
        self.pool = pool
        self._stream = stream
        self._staging = staging
        self._tokens = tokens
        self._buckets = decode_buckets(max_batch)
        self._own = tuple(sorted(own_buckets))
        self._results = [Results(max_batch, limits.vocab_size) for _ in range(SETS)]
        self._steps = 0
        self._lost: GpuLostError | None = None
        self._closed = False

    def execute(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run one step and return logits [N, vocab], valid until the next call. More rows than a step has sequences are
        computed a batch at a time, each time with the whole step."""
        wanted = len(batch.logits_index)
        logits = np.empty((wanted, self.limits.vocab_size), np.float32)
        for start in range(0, max(1, wanted), self.max_batch):
            rows = slice(start, min(wanted, start + self.max_batch))
            logits[rows] = self._launch(batch, batch.logits_index[rows], None, copies=start == 0).result().logits
        return logits

    def submit(self, batch: StepBatch, sampling: SamplingBatch) -> Submitted:
        return self._launch(batch, batch.logits_index, sampling)

    def release(self, blocks: Sequence[int]) -> None:
        """Nothing to do: the pool keeps its memory."""

    def close(self) -> None:
        """Wait for what was submitted, and free everything."""
        if self._closed:
            return
        self._closed = True
        try:
            self.device.use()
            self._stream.synchronize()
        except EngineError:  # the GPU is lost; what can be freed is freed
            pass
        for part in (self.executor, self.pool, self._staging, self._tokens, self._stream):
            part.free()

    def profile(self, sequences: int, context: int, *, repeats: int = 20) -> StepProfile:
        """Where the time of a decode step goes: each part's and layer's milliseconds on the GPU, and the whole step's as it runs
        otherwise. `sequences` of `context` tokens each; what the KV pool holds is overwritten, so nothing may be under way.
        """
        batch = decode_batch(self.limits, sequences, context)
        self.execute(batch)  # captured, and its integers staged
        return measure(self.executor, self.shape(batch, sequences), self._stream, repeats)

    def shape(self, batch: StepBatch, rows: int) -> StepShape:
        """How a step runs: a decode step padded to its bucket, any other as it is."""
        tokens, size = len(batch.input_ids), len(batch.kv_len)
        if tokens > self.limits.max_tokens_per_step or size > self.max_batch or rows > self.max_batch:
            raise InputError(
                f"a step of {tokens} tokens, {size} sequences and {rows} rows of logits; this engine takes "
                f"{self.limits.max_tokens_per_step}, {self.max_batch} and {self.max_batch}"
            )
        decode = tokens == size
        single = np.diff(batch.query_start) == 1
        longest = int(batch.kv_len.max(where=single, initial=0))
        if decode:
            tokens = size = rows = bucket_for(size, self._buckets, self._own)
        most = self.limits.max_blocks_per_seq
        width = most
        if self.executor.plugin:  # which takes the width of the table for the longest context
            width = table_width(-(-int(batch.kv_len.max()) // self.limits.block_size), most)
        return StepShape(tokens, size, max(1, rows), decode, width, self.executor.splits(size, longest))

    def _launch(
        self,
        batch: StepBatch,
        logits_index: NDArray[np.int64],
        sampling: SamplingBatch | None,
        *,
        copies: bool = True,
    ) -> Submitted:
        self._check()
        shape = self.shape(batch, len(logits_index))
        which = self._steps % SETS
        results = self._results[which]
        try:
            self.device.use()
            results.wait()  # its staging is free once the step before the last is over
            if copies:
                self._copy_blocks(batch)
            nbytes = self._staging.fill(which, batch, logits_index, shape, sampling)
            self._staging.copy(which, nbytes, self._stream)
            if bool((batch.input_ids < 0).any()):
                self._tokens.take_previous(shape, self._stream)
            self.executor.run(shape)
            if sampling is not None:
                self._tokens.sample(len(logits_index), bool((sampling.temperature > 0).any()), self._stream)
                results.fetch_tokens(self._tokens.address, len(logits_index), self._stream)
                results.fetch_logits(self.executor.logits, sampling.host_rows, self._stream)
            else:
                results.fetch_logits(self.executor.logits, np.arange(len(logits_index)), self._stream)
            results.finish(self._stream)
        except EngineError as error:
            raise self._told(error) from error
        except BaseException:  # Ctrl-C: what was enqueued must be over before its staging is filled anew
            self._stream.synchronize()
            raise
        self._steps += 1
        return Submitted(results, self._told)

    def _copy_blocks(self, batch: StepBatch) -> None:
        for copy in batch.copies:
            spans = zip(
                self.pool.spans(copy.src, copy.num_tokens), self.pool.spans(copy.dst, copy.num_tokens), strict=True
            )
            for (source, nbytes), (target, _) in spans:
                copy_async(target, source, nbytes, self._stream)

    def _check(self) -> None:
        if self._closed:
            raise EngineError("this engine was closed: open it again")
        if self._lost is not None:
            raise GpuLostError(str(self._lost))

    def _told(self, error: EngineError) -> EngineError:
        """The error, or that the GPU is lost, if that is behind it: then it stays so."""
        if not isinstance(error, GpuLostError):
            try:
                self._stream.synchronize()
            except GpuLostError as lost:
                error = lost
            except EngineError:
                pass
        if isinstance(error, GpuLostError):
            self._lost = error
        return error
