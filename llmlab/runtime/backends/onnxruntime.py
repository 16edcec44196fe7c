"""Steps on ONNX Runtime's CPU: one session, KV slots bound in place, bindings kept between steps."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llmlab.errors import EngineError, InputError
from llmlab.machine import physical_cores
from llmlab.runtime.backends.partition import CostModel
from llmlab.runtime.backends.slots import SlotPool
from llmlab.runtime.batch import EngineLimits, StepBatch
from llmlab.runtime.manifest import MODEL, PREFILL_MODEL, WEIGHTS, Manifest

_MOST_SPANS = 128
"""Ranges of slots whose bindings are kept, the latest used."""
_MANY_ROWS = 8
"""Tokens in a run from which on products of integers are faster than those that unpack weights."""


@dataclass
class _Span:
    """A range of slots [low, high) that runs together, and what is bound for it."""

    low: int
    high: int
    session: ort.InferenceSession
    binding: ort.IOBinding
    layout: tuple[object, ...] = ()
    """What the bound buffers were made for."""
    feeds: dict[str, NDArray] = field(default_factory=dict)


class OnnxRuntimeBackend:
    """Implements `Backend` over KV slots. `run_seconds` adds up the time spent inside ONNX Runtime itself.

    profile: a folder that gets each model as ONNX Runtime optimized it and, from `end_profiling`, what each node took.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, threads: int | None, num_slots: int, profile: Path | None = None
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}, expected an integer of at least 1")
        self.threads = threads or physical_cores()
        prefill = manifest.products is not None and bool(manifest.products.prefill)
        self._session = _session(folder / MODEL, self.threads, prefill, profile)
        self._many = _session(folder / PREFILL_MODEL, self.threads, True, profile) if prefill else self._session
        self._pool = SlotPool(manifest.kv.layers, num_slots, manifest.kv.capacity, manifest.kv.dtype)
        vocab = self._session.get_outputs()[0].shape[1]
        self.limits = EngineLimits(
            vocab_size=vocab if isinstance(vocab, int) else manifest.config.vocab_size,
            max_seq_len=manifest.limits.max_seq_len,
            max_tokens_per_step=manifest.limits.max_tokens_per_step,
            num_blocks=num_slots,
            block_size=manifest.limits.max_seq_len,
        )
        self.run_seconds = 0.0
        self._cost = CostModel(
            weights=int(manifest.files[WEIGHTS]["size"]),
            row=8 * sum(heads * dim for heads, dim in manifest.kv.layers) * (1 + self._group(manifest)),
        )
        self._takes_positions = any(i.name == "position_ids" for i in self._session.get_inputs())
        self._spans: OrderedDict[tuple[int, int, bool], _Span] = OrderedDict()
        self._logits = np.empty((0, self.limits.vocab_size), np.float32)
        self._last: tuple[tuple[bytes, bytes], _Span, NDArray[np.int32]] | None = None
        """What the step before was of, if all its sequences had one token: slots and rows of logits; where it ran, and its rows there."""

    @staticmethod
    def _group(manifest: Manifest) -> int:
        """Query heads to a KV head."""
        return max(1, manifest.config.num_heads // manifest.kv.layers[0][0])

    def execute(self, batch: StepBatch) -> NDArray[np.float32]:
        for copy in batch.copies:
            self._pool.copy(copy.src, copy.dst, copy.num_tokens)
        wanted = len(batch.logits_index)
        if len(self._logits) < wanted:
            self._logits = np.empty((wanted, self.limits.vocab_size), np.float32)
            self._last = None
        slots = batch.block_table[:, 0]
        if len(batch.input_ids) == len(slots):
            self._decode(batch, slots)
            return self._logits[:wanted]
        self._last = None
        for start, end in self._cost.parts(np.diff(batch.query_start), slots):
            self._run(batch, slots, start, end)
        return self._logits[:wanted]

    def _decode(self, batch: StepBatch, slots: NDArray[np.int32]) -> None:
        """Run a step of one token each, which mostly is of the sequences of the step before: then there is little to fill in."""
        key = slots.tobytes(), batch.logits_index.tobytes()
        if self._last is None or self._last[0] != key:
            span = self._run(batch, slots, 0, len(slots))
            self._last = key, span, slots - span.low
            return
        _, span, rows = self._last
        self._start(span, rows, batch.input_ids, batch.kv_len, batch.position_ids)

    def _run(self, batch: StepBatch, slots: NDArray[np.int32], start: int, end: int) -> _Span:
        """Run sequences [start, end) of the batch, and where they ran. Their logits get into their places."""
        tokens = slice(batch.query_start[start], batch.query_start[end])
        starts, slots = batch.query_start[start : end + 1] - tokens.start, slots[start:end]
        wanted = slice(*np.searchsorted(batch.logits_index, (tokens.start, tokens.stop)))
        index = batch.logits_index[wanted] - tokens.start
        logits = self._logits[wanted]
        span = self._span(int(slots.min()), int(slots.max()) + 1, tokens.stop - tokens.start >= _MANY_ROWS)
        layout = (starts.tobytes(), slots.tobytes(), index.tobytes(), logits.ctypes.data)
        if span.layout != layout:
            self._lay_out(span, starts, slots, index, logits)
            span.layout = layout
        rows, kv_len = slots - span.low, batch.kv_len[start:end]
        self._start(span, rows, batch.input_ids[tokens], kv_len, batch.position_ids[tokens])
        return span

    def _start(
        self,
        span: _Span,
        rows: NDArray[np.int32],
        input_ids: NDArray[np.int64],
        kv_len: NDArray[np.int32],
        position_ids: NDArray[np.int64],
    ) -> None:
        """Fill in what each step has of its own, and run. rows: of the span, one for each sequence."""
        span.feeds["input_ids"][:] = input_ids
        span.feeds["seqlens_k"][rows] = kv_len - 1
        if self._takes_positions:
            span.feeds["position_ids"][:] = position_ids
        began = time.perf_counter()
        span.session.run_with_iobinding(span.binding)
        self.run_seconds += time.perf_counter() - began

    def _lay_out(
        self,
        span: _Span,
        starts: NDArray[np.int32],
        slots: NDArray[np.int32],
        index: NDArray[np.int64],
        logits: NDArray[np.float32],
    ) -> None:
        """Bind buffers for a step of this shape. Decodes in a row have the same, so most steps only fill them."""
        new, count = np.diff(starts), int(starts[-1])
        rows, width = span.high - span.low, int(new.max())
        query_seqlens = np.zeros(rows, np.int32)
        query_seqlens[slots - span.low] = new
        lies_at = np.repeat((slots - span.low) * width - starts[:-1], new) + np.arange(count)
        unpack_index = np.zeros(rows * width, np.int64)
        unpack_index[lies_at] = np.arange(count)
        span.feeds = {
            "input_ids": np.empty(count, np.int64),
            "logits_index": index,
            "unpack_index": unpack_index.reshape(rows, width),
            "pack_index": lies_at.astype(np.int64),
            "seqlens_k": np.zeros(rows, np.int32),
            "query_seqlens": query_seqlens,
        }
        if self._takes_positions:
            span.feeds["position_ids"] = np.empty(count, np.int64)
        for name, array in span.feeds.items():
            span.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        span.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def _span(self, low: int, high: int, many: bool) -> _Span:
        """Slots [low, high), their pasts and presents bound to the same memory, so that the update is in place; for a run of
        few rows or of many."""
        key, session = (low, high, many), self._many if many else self._session
        if key in self._spans:
            self._spans.move_to_end(key)
            return self._spans[key]
        if len(self._spans) >= _MOST_SPANS:
            self._spans.popitem(last=False)
        binding = session.io_binding()
        for i, layer in enumerate(self._pool.layers):
            for what, half in zip(("key", "value"), layer, strict=True):
                part = half[low:high]
                for bind, name in (
                    (binding.bind_input, f"past_{what}.{i}"),
                    (binding.bind_output, f"present_{what}.{i}"),
                ):
                    bind(name, "cpu", 0, part.dtype, part.shape, part.ctypes.data)
        self._spans[key] = _Span(low, high, session, binding)
        return self._spans[key]

    def release(self, blocks: Sequence[int]) -> None:
        self._pool.release(blocks)

    def end_profiling(self) -> list[tuple[Path, Path]]:
        """(the optimized model, ONNX Runtime's profile) of each session, that of many rows last; where `profile` was given, and once."""
        sessions = {MODEL: self._session} | ({} if self._many is self._session else {PREFILL_MODEL: self._many})
        profiles = {name: Path(session.end_profiling()) for name, session in sessions.items()}
        return [(path.parent / name, path) for name, path in profiles.items()]

    def close(self) -> None:
        self._last = None
        self._spans.clear()


_FUSED_ACCURACY = "session.qdq_matmulnbits_accuracy_level"
"""What products compute in that ONNX Runtime fuses by itself with a DequantizeLinear of their weight: 1 is float32, as the graph says;
left alone it rounds activations to int8."""


def _session(model: Path, threads: int, shared: bool, profile: Path | None) -> ort.InferenceSession:
    """shared: another session runs on the same cores in turn with this one, so its threads must not spin between runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(_FUSED_ACCURACY, "1")
    if shared:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / model.stem)
        options.optimized_model_filepath = str(profile / model.name)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # ONNX Runtime raises types of its own, one a status
        reason = str(problem).strip().splitlines()[0]
        raise EngineError(f"{model}: ONNX Runtime {ort.__version__} can't open it: {reason}") from problem
