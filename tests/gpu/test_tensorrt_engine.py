"""A TensorRT engine on the GPU that is here, against transformers. `benchmarks/gpu_tinychat.py` does more, without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Store
from steps import RAGGED, all_rows, batches, cached_generation, off_by_one_length, paged_tables, worst_error
from tiny import VOCAB

import llmlab as ll
from llmlab.tensorrt.gpu import visible_gpu

if visible_gpu() is None or importlib.util.find_spec("tensorrt") is None:
    pytest.skip("needs an NVIDIA GPU and TensorRT", allow_module_level=True)

BOUND, BLOCKS = 2e-2, 40


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def built(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    name = request.param
    config = ll.BuildConfig(block_size=16, max_batch=8, max_tokens_per_step=80, optimization_level=1)
    folder: Path = tmp_path_factory.mktemp("engines") / name
    backend = ll.build(store.serving(name), folder, target="tensorrt", config=config).backend(
        max_num_seqs=8, kv_blocks=BLOCKS
    )
    yield backend, cached_generation(store.model(name), RAGGED, VOCAB)
    backend.close()


def errors(backend: Any, expected: list[np.ndarray], change: Any = lambda batch: batch) -> list[float]:
    table = paged_tables(RAGGED, 16, BLOCKS)
    full = np.full((len(table), backend.limits.max_blocks_per_seq), -1, np.int32)
    full[:, : table.shape[1]] = table[:, : full.shape[1]]
    return [
        worst_error(backend.execute(change(batch)), np.array([expected[b][t] for b, t in wanted]))
        for batch, wanted in batches(RAGGED, VOCAB, full, all_rows)
    ]


def test_ragged_steps_give_what_transformers_gives(built: Any) -> None:
    for _ in range(3):  # what is captured the first time is replayed
        assert max(errors(*built)) < BOUND
    assert built[0].executor.graphs


def test_a_key_too_few_is_noticed(built: Any) -> None:
    assert max(errors(*built, off_by_one_length)) > 2 * BOUND
    assert max(errors(*built)) < BOUND
