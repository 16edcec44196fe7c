"""Steps on ONNX Runtime's CPU: one session, KV slots bound in place, bindings kept between steps."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llmlab.errors import EngineError, InputError
from llmlab.machine import physical_cores
from llmlab.runtime.backends.partition import CostModel
from llmlab.runtime.backends.slots import SlotPool
from llmlab.runtime.batch import EngineLimits, StepBatch
from llmlab.runtime.manifest import MODEL, WEIGHTS, Manifest

_MOST_BINDINGS = 128
"""Ranges of slots whose bindings are kept, the latest used."""


class OnnxRuntimeBackend:
    """Implements `Backend` over KV slots. `run_seconds` adds up the time spent inside ONNX Runtime itself."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None, num_slots: int) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}, expected an integer of at least 1")
        self.threads = threads or physical_cores()
        self._session = _session(folder / MODEL, self.threads)
        self._pool = SlotPool(manifest.kv.layers, num_slots, manifest.kv.capacity)
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
        self._bindings: OrderedDict[tuple[int, int], ort.IOBinding] = OrderedDict()
        self._logits = np.empty((0, self.limits.vocab_size), np.float32)

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
        slots = batch.block_table[:, 0]
        for start, end in self._cost.parts(np.diff(batch.query_start), slots):
            self._run(batch, slots, start, end)
        return self._logits[:wanted]

    def _run(self, batch: StepBatch, slots: NDArray[np.int32], start: int, end: int) -> None:
        """Run sequences [start, end) of the batch and put their logits in their places."""
        tokens = slice(batch.query_start[start], batch.query_start[end])
        starts, slots = batch.query_start[start : end + 1] - tokens.start, slots[start:end]
        new = np.diff(starts)
        low, high = int(slots.min()), int(slots.max()) + 1
        rows, width = high - low, int(new.max())
        query_seqlens = np.zeros(rows, np.int32)
        query_seqlens[slots - low] = new
        seqlens_k = np.zeros(rows, np.int32)
        seqlens_k[slots - low] = batch.kv_len[start:end] - 1
        lies_at = np.repeat((slots - low) * width - starts[:-1], new) + np.arange(starts[-1])
        unpack_index = np.zeros(rows * width, np.int64)
        unpack_index[lies_at] = np.arange(len(lies_at))
        wanted = slice(*np.searchsorted(batch.logits_index, (tokens.start, tokens.stop)))
        feeds: dict[str, NDArray] = {
            "input_ids": batch.input_ids[tokens],
            "logits_index": batch.logits_index[wanted] - tokens.start,
            "unpack_index": unpack_index.reshape(rows, width),
            "pack_index": lies_at.astype(np.int64),
            "seqlens_k": seqlens_k,
            "query_seqlens": query_seqlens,
        }
        if self._takes_positions:
            feeds["position_ids"] = batch.position_ids[tokens]
        logits = self._logits[wanted]
        binding = self._binding(low, high)
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        began = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.run_seconds += time.perf_counter() - began

    def _binding(self, low: int, high: int) -> ort.IOBinding:
        """The binding of slots [low, high): pasts and presents are the same memory, so the update is in place."""
        if (low, high) in self._bindings:
            self._bindings.move_to_end((low, high))
        else:
            if len(self._bindings) >= _MOST_BINDINGS:
                self._bindings.popitem(last=False)
            binding = self._session.io_binding()
            for i, layer in enumerate(self._pool.layers):
                for what, half in zip(("key", "value"), layer, strict=True):
                    part = half[low:high]
                    for bind, name in (
                        (binding.bind_input, f"past_{what}.{i}"),
                        (binding.bind_output, f"present_{what}.{i}"),
                    ):
                        bind(name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            self._bindings[low, high] = binding
        return self._bindings[low, high]

    def release(self, blocks: Sequence[int]) -> None:
        self._pool.release(blocks)

    def close(self) -> None:
        self._bindings.clear()


def _session(model: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # ONNX Runtime raises types of its own, one a status
        reason = str(problem).strip().splitlines()[0]
        raise EngineError(f"{model}: ONNX Runtime {ort.__version__} can't open it: {reason}") from problem
