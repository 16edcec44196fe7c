"""Engines that are a little off, and logits one token at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import constants
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.engine import Engine


def noisy(graph: Graph, share: float, seed: int = 0, only: str = "proj") -> Graph:
    """A copy with noise of `share` of their spread on the weights that have `only` in their name."""
    random = np.random.default_rng(seed)
    graph = graph.copy()
    for weight in constants(graph.surgeon):
        if len(weight.shape) == 2 and only in weight.name:
            values = np.asarray(weight.values, np.float32)
            noise = random.standard_normal(values.shape).astype(np.float32) * values.std() * share
            weight.values = (values + noise).astype(weight.values.dtype)
    return graph


def single_steps(path: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """Logits [len - 1, vocab] of each sequence: one sequence, one token a step."""
    engine = Engine.load(path)
    backend = engine.backend(max_num_seqs=1, threads=1)
    found = []
    for ids in sequences:
        rows = []
        for place, token in enumerate(ids[:-1]):
            step = StepBatch(
                input_ids=np.array([token], np.int64),
                position_ids=np.array([place], np.int64),
                query_start=np.array([0, 1], np.int32),
                kv_len=np.array([place + 1], np.int32),
                block_table=np.zeros((1, 1), np.int32),
                logits_index=np.zeros(1, np.int64),
            )
            rows.append(backend.execute(step)[0].copy())
        found.append(np.array(rows))
    backend.close()
    return found
