"""Steps on ONNX Runtime's CPU: one session, KV slots bound in place, bindings kept between steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llmlab.errors import EngineError, InputError
from llmlab.machine import physical_cores
from llmlab.runtime.backends.slots import SlotPool
from llmlab.runtime.batch import EngineLimits, StepBatch
from llmlab.runtime.manifest import MODEL, Manifest


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
        self._takes_positions = any(i.name == "position_ids" for i in self._session.get_inputs())
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._logits = np.empty((0, self.limits.vocab_size), np.float32)

    def execute(self, batch: StepBatch) -> NDArray[np.float32]:
        for copy in batch.copies:
            self._pool.copy(copy.src, copy.dst, copy.num_tokens)
        wanted = len(batch.logits_index)
        if len(self._logits) < wanted:
            self._logits = np.empty((wanted, self.limits.vocab_size), np.float32)
        self._run(batch, self._logits[:wanted])
        return self._logits[:wanted]

    def _run(self, batch: StepBatch, logits: NDArray[np.float32]) -> None:
        slots = batch.block_table[:, 0]
        new = np.diff(batch.query_start)
        low, high = int(slots.min()), int(slots.max()) + 1
        low = 0 if len(slots) > 1 else low
        rows, width = high - low, int(new.max())
        query_seqlens = np.zeros(rows, np.int32)
        query_seqlens[slots - low] = new
        seqlens_k = np.zeros(rows, np.int32)
        seqlens_k[slots - low] = batch.kv_len - 1
        lies_at = np.repeat((slots - low) * width - batch.query_start[:-1], new) + np.arange(len(batch.input_ids))
        unpack_index = np.zeros(rows * width, np.int64)
        unpack_index[lies_at] = np.arange(len(lies_at))
        feeds: dict[str, NDArray] = {
            "input_ids": batch.input_ids,
            "logits_index": batch.logits_index,
            "unpack_index": unpack_index.reshape(rows, width),
            "pack_index": lies_at.astype(np.int64),
            "seqlens_k": seqlens_k,
            "query_seqlens": query_seqlens,
        }
        if self._takes_positions:
            feeds["position_ids"] = batch.position_ids
        binding = self._binding(low, high)
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.run_seconds += time.perf_counter() - start

    def _binding(self, low: int, high: int) -> ort.IOBinding:
        """The binding of slots [low, high): pasts and presents are the same memory, so the update is in place."""
        if (low, high) not in self._bindings:
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
