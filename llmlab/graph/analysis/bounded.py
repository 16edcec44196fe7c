"""Run a piece of a graph in ONNX Runtime within bounds: a file's arithmetic may ask for any size, and may never end."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort

from llmlab.files import EXCERPT_LIMIT, TIME_LIMIT, WORK_LIMIT


class CannotEvaluate(Exception):
    """ONNX Runtime doesn't run the excerpt, in one line."""


class BoundedSession:
    """A model in ONNX Runtime (its own optimisations off) whose runs take at most `WORK_LIMIT` bytes and `TIME_LIMIT` seconds.

    Nothing stops ONNX Runtime while it makes the session, which takes 0.1 ms a node, and 1 ms a subgraph: hence a limit.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Raises CannotEvaluate."""
        if _size(model.graph) > EXCERPT_LIMIT:
            raise CannotEvaluate(f"more than {EXCERPT_LIMIT} nodes")
        _limit_memory()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.use_env_allocators", "1")
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # ONNX Runtime raises types of its own, one a status
            raise CannotEvaluate(" ".join(str(problem).split())) from problem

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs; of `feeds`, what the model reads is taken. Raises CannotEvaluate."""
        options = ort.RunOptions()
        options.log_severity_level = 4
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        watchdog = threading.Timer(TIME_LIMIT, setattr, (options, "terminate", True))
        watchdog.daemon = True
        watchdog.start()
        wanted = {i.name for i in self._session.get_inputs()}
        try:
            results = self._session.run(None, {k: v for k, v in feeds.items() if k in wanted}, options)
        except Exception as problem:
            raise CannotEvaluate(" ".join(str(problem).split())) from problem
        finally:
            watchdog.cancel()
        return [np.asarray(r) for r in results]


def _size(graph: onnx.GraphProto) -> int:
    """Nodes, those of subgraphs included."""
    inner = (g for n in graph.node for a in n.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs))
    return len(graph.node) + sum(_size(g) for g in inner)


@cache
def _limit_memory() -> None:
    """One arena for all bounded sessions of the process; sessions that don't ask for it have their own."""
    ort.set_default_logger_severity(4)  # a size that overflows is told on standard error besides being raised
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    chunk = 1 << 20  # bytes
    limits = {
        "max_mem": WORK_LIMIT,
        "arena_extend_strategy": 1,  # grow by what is asked for, not by doubling
        "initial_chunk_size_bytes": chunk,
        "max_dead_bytes_per_chunk": chunk,
    }
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(limits))
