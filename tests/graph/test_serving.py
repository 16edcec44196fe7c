"""The whole road against transformers: plain graph, serving graph in the interpreter, engine on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import steps
import tiny
from conftest import Store
from steps import RAGGED, Plan, worst_error

from llmlab.graph.interpret import Interpreter
from llmlab.runtime.backends.partition import CostModel
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.engine import Engine

TOLERANCE = 1e-4
every_model = pytest.mark.parametrize("name", tiny.SUPPORTED)


@pytest.fixture(scope="session")
def oracle(store: Store) -> Callable[[str], list[np.ndarray]]:
    """Logits of RAGGED from transformers' cached generation, by model name."""
    made: dict[str, list[np.ndarray]] = {}

    def get(name: str) -> list[np.ndarray]:
        if name not in made:
            made[name] = steps.cached_generation(store.model(name), RAGGED, tiny.VOCAB)
        return made[name]

    return get


def plain_session(graph: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])


@every_model
def test_plain_graph_equals_transformers_on_ragged_prompts(store: Store, name: str) -> None:
    import torch

    session, model = plain_session(store.plain(name)), store.model(name)
    lengths = [1, 4, 13, tiny.MAX_LEN]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, tiny.VOCAB, n) for n in lengths]
    padded = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    positions = np.tile(np.arange(max(lengths)), (len(prompts), 1))
    (together,) = session.run(None, {"input_ids": padded, "position_ids": positions})
    for row, prompt in zip(together, prompts, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(prompt[None])).logits[0].numpy()
        (alone,) = session.run(None, {"input_ids": prompt[None], "position_ids": np.arange(len(prompt))[None]})
        assert worst_error(row[: len(prompt)], expected) < TOLERANCE
        assert worst_error(alone[0], expected) < TOLERANCE
        assert np.abs(expected).max() > 0.5, "the oracle's logits are too flat to tell right from wrong"


def interpret(graph: Any, plan: Plan, wanted: Any, spoil: Callable[[StepBatch], StepBatch] | None = None) -> list:
    """(sequence and token of each row, logits) of every step, in blocks of 4 out of a pool of NaNs."""
    interpreter = Interpreter(graph, num_blocks=48, block_size=4)
    tables = steps.paged_tables(plan, 4, 48)
    result = []
    for batch, rows in steps.batches(plan, tiny.VOCAB, tables, wanted):
        batch = batch if spoil is None else spoil(batch)
        result.append((rows, interpreter.step(steps.feeds(batch))))
    return result


def errors(result: list, expected: list[np.ndarray]) -> list[float]:
    assert all(len(rows) == len(logits) for rows, logits in result)
    return [worst_error(logits, np.array([expected[b][i] for b, i in rows])) for rows, logits in result if rows]


@every_model
@pytest.mark.parametrize("wanted", [steps.all_rows, steps.some_rows])
def test_serving_graph_equals_cached_generation(store: Store, oracle: Any, name: str, wanted: Any) -> None:
    result = interpret(store.serving(name), RAGGED, wanted)
    assert max(errors(result, oracle(name))) < TOLERANCE


def permuted_blocks(batch: StepBatch) -> StepBatch:
    """The first two blocks trade places, from when a sequence has more than two (before, it would not be seen)."""
    table = batch.block_table.copy()
    long = (batch.kv_len > 8) & (np.diff(batch.query_start) == 1)
    table[long, 0], table[long, 1] = batch.block_table[long, 2], batch.block_table[long, 0]
    return replace(batch, block_table=table)


@pytest.mark.parametrize("spoil", [steps.off_by_one_position, steps.off_by_one_length, permuted_blocks])
def test_a_wrong_step_is_seen(store: Store, oracle: Any, spoil: Any) -> None:
    result = interpret(store.serving("llama"), RAGGED, steps.all_rows, spoil)
    assert max(errors(result, oracle("llama"))) > 100 * TOLERANCE


def execute(engine: Engine, plan: Plan, slots: list[int], spoil: Any = None, wanted: Any = steps.all_rows) -> list:
    backend = engine.backend(threads=1, max_num_seqs=max(slots) + 2)
    for layer in backend._pool.layers:
        layer[:] = np.nan
    result = []
    for batch, rows in steps.batches(plan, tiny.VOCAB, steps.slot_tables(plan, slots), wanted):
        batch = batch if spoil is None else spoil(batch)
        result.append((rows, backend.execute(batch).copy()))
    backend.close()
    return result


@every_model
@pytest.mark.parametrize("wanted", [steps.all_rows, steps.some_rows])
def test_engine_equals_cached_generation(store: Store, oracle: Any, name: str, wanted: Any) -> None:
    result = execute(Engine.load(store.engine(name)), RAGGED, [4, 1, 0, 6, 3], wanted=wanted)
    assert max(errors(result, oracle(name))) < TOLERANCE


def test_sequences_may_run_apart(store: Store, oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a step is split into runs, the logits come out the same, and in their places."""
    monkeypatch.setattr(CostModel, "parts", lambda self, new, slots: [(i, i + 1) for i in range(len(new))])
    for wanted in (steps.all_rows, steps.some_rows):
        result = execute(Engine.load(store.engine("llama")), RAGGED, [4, 1, 0, 6, 3], wanted=wanted)
        assert max(errors(result, oracle("llama"))) < TOLERANCE


@pytest.mark.parametrize("spoil", [steps.off_by_one_length, steps.traded_slots])
def test_a_wrong_step_is_seen_by_the_engine(store: Store, oracle: Any, spoil: Any) -> None:
    result = execute(Engine.load(store.engine("llama")), RAGGED, [4, 1, 0, 6, 3], spoil)
    assert max(errors(result, oracle("llama"))) > 100 * TOLERANCE
