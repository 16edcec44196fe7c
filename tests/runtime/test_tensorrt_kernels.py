"""A TensorRT engine whose attention, sampling and feeding are the real kernels, run by Triton's interpreter: what they are
handed (addresses, strides, tables, padding) is right. TensorRT itself is played by ONNX Runtime."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")

from conftest import Store
from emulated_gpu import EmulatedGpu
from fake_driver import installed
from fake_tensorrt import FakeBuilder, FakeLibrary
from steps import Plan, batches, cached_generation, off_by_one_length, paged_tables, worst_error
from test_tensorrt_backend import greedy
from tiny import VOCAB

import llmlab as ll
from llmlab.kernels.binaries import KernelSet

PLAN = Plan(((9, 1, 1), (0, 16, 1), (1, 3, 1)))  # first prompts, a chunk, a whole block beside a decode; then decodes
BLOCKS = 8


class Emulated(EmulatedGpu):
    """With somewhere for the played parts to put their work."""

    @property
    def enqueue(self) -> Any:
        return self._do


@pytest.fixture(scope="module", params=["tensorrt", pytest.param("kernels", marks=pytest.mark.slow)])
def engine(request: Any, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An fp16 engine's backend, with decode steps captured; products as one that is played computes them, and by our kernels."""
    config = ll.BuildConfig(
        block_size=16,
        max_batch=4,
        max_tokens_per_step=40,
        products=request.param,
        compute_capabilities=((9, 0),),
    )
    sources: list[Any] = []

    def compile_kernels(given: Any, architectures: Any, progress: Any = None) -> KernelSet:
        sources.extend(given)
        return EmulatedGpu(sources).kernels

    gpu = SimpleNamespace(name="Fake GPU", compute_capability=(9, 0), cuda=(13, 0))
    with pytest.MonkeyPatch.context() as patch:
        library = FakeLibrary(None)  # type: ignore[arg-type]
        patch.setattr("llmlab.build_tensorrt.resolve", lambda kind: library)
        patch.setattr("llmlab.build_tensorrt.visible_gpu", lambda: gpu)
        patch.setattr("llmlab.build_tensorrt.PlanBuilder", FakeBuilder)
        patch.setattr("llmlab.program_tensorrt.compile_kernels", compile_kernels)
        patch.setattr("llmlab.runtime.backends.tensorrt.open.resolve", lambda kind: library)
        engine = ll.build(store.serving("llama"), tmp_path_factory.mktemp("e") / "e", target="tensorrt", config=config)
        driver = Emulated(sources)
        object.__setattr__(library, "driver", driver)
        with installed(driver):
            backend = engine.backend(max_num_seqs=4, kv_blocks=BLOCKS)
            yield backend
            backend.close()


def steps() -> list[Any]:
    table = paged_tables(PLAN, 16, BLOCKS)
    full = np.full((len(table), 4), -1, np.int32)
    full[:, : table.shape[1]] = table[:, :4]
    return batches(PLAN, VOCAB, full, lambda step, rows: np.arange(rows))


@pytest.mark.slow  # the same steps with the reference's attention, and the kernels by themselves, are tested in CI
def test_ragged_steps_give_what_transformers_gives(store: Store, engine: Any) -> None:
    expected = cached_generation(store.model("llama"), PLAN, VOCAB)
    for batch, wanted in [*steps(), steps()[-1]]:  # the last one again, as it was captured
        want = np.array([expected[b][t] for b, t in wanted])
        assert worst_error(engine.execute(batch), want) < 1e-2
    assert [shape.batch for shape in engine.executor.graphs] == [4]
    assert worst_error(engine.execute(off_by_one_length(batch)), want) > 5e-2


def test_tokens_are_chosen_and_fed_to_the_next_step(engine: Any) -> None:
    batch = steps()[0][0]
    last = np.asarray(batch.query_start[1:] - 1, np.int64)
    batch = replace(batch, logits_index=last)
    chosen = engine.execute(batch).argmax(axis=1)
    follow = replace(
        batch,
        input_ids=chosen,
        position_ids=batch.kv_len.astype(np.int64),
        query_start=np.arange(len(chosen) + 1, dtype=np.int32),
        kv_len=batch.kv_len + 1,
        logits_index=np.arange(len(chosen)),
    )
    want = engine.execute(follow).argmax(axis=1)
    one = engine.submit(batch, greedy(len(chosen)))
    two = engine.submit(replace(follow, input_ids=-1 - np.arange(len(chosen))), greedy(len(chosen)))
    assert one.result().token_ids.tolist() == chosen.tolist()
    assert two.result().token_ids.tolist() == want.tolist()
    drawn = engine.submit(batch, greedy(len(chosen), temperature=5.0)).result().token_ids
    assert ((drawn >= 0) & (drawn < VOCAB)).all() and drawn.tolist() != chosen.tolist()
