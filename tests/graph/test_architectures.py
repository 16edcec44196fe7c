"""Every family of `tests/families.py`: a checkpoint goes down the whole road, and its engine answers like transformers.

With LLMLAB_RECORD set to a folder, each test leaves what it measured there (see `benchmarks/architectures.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
import tiny
from families import FAMILIES, QUICK, Family, shallow
from numpy.typing import NDArray
from steps import PREEMPTED, PREEMPTED_SLOTS, RAGGED, worst_error

from llmlab.build import build
from llmlab.graph.export import export
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.optimize import optimize
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.engine import Engine

TOLERANCE = 1e-4
SEEN = 100 * TOLERANCE

Logits = list[NDArray[np.float32]]
Spoil = Callable[[StepBatch], StepBatch]


def oracle(model: Any, family: Family, plan: steps.Plan) -> Logits:
    """Transformers' cached generation, or, where the export was told the longest sequence, each sequence at once, made as
    long as that: with longrope's long factors from the first token, which its cache would have mixed with short ones."""
    if family.max_seq_len is None:
        return steps.cached_generation(model, plan, tiny.VOCAB)
    return steps.all_at_once(model, plan, tiny.VOCAB, family.max_seq_len)


def in_flight(engine: Engine, expected: Logits, spoil: Spoil = lambda batch: batch) -> float:
    """The worst error of the engine over PREEMPTED; its slots are full of NaN before."""
    backend = engine.backend(threads=1, max_num_seqs=max(PREEMPTED_SLOTS) + 2)
    for layer in backend._pool.layers:
        layer[:] = np.nan
    tables = steps.slot_tables(PREEMPTED, PREEMPTED_SLOTS)
    worst = 0.0
    for batch, rows in steps.batches(PREEMPTED, tiny.VOCAB, tables, steps.all_rows):
        truth = np.array([expected[b][i] for b, i in rows])
        worst = max(worst, worst_error(backend.execute(spoil(batch)), truth))
    backend.close()
    return worst


def controls(engine: Engine, expected: Logits) -> dict[str, float]:
    """Errors of steps with something wrong in them: a slot, a length, and a position where the engine asks for it."""
    spoils = [steps.traded_slots, steps.off_by_one_length]
    if "position_ids" in {i.name for i in engine.backend(threads=1, max_num_seqs=1)._session.get_inputs()}:
        spoils.append(steps.off_by_one_position)
    return {spoil.__name__: in_flight(engine, expected, spoil) for spoil in spoils}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_answers_like_transformers(tmp_path: Path, name: str) -> None:
    error, wrong = answers(tmp_path, FAMILIES[name])
    record(name, error, wrong)


@pytest.mark.parametrize("name", QUICK)
def test_a_shallow_engine_answers_like_transformers(tmp_path: Path, name: str) -> None:
    """With one layer where all layers are alike."""
    answers(tmp_path, shallow(FAMILIES[name]))


def answers(tmp_path: Path, family: Family) -> tuple[float, dict[str, float]]:
    """Errors of the engine, and of the engine with something wrong in its steps; both as they must be."""
    model = tiny.make_model(family.config)
    model.save_pretrained(tmp_path / "checkpoint")
    serving = optimize(export(tmp_path / "checkpoint", max_seq_len=family.max_seq_len))
    engine = build(serving, tmp_path / "engine", max_tokens_per_step=32)
    expected = oracle(model, family, PREEMPTED)
    error, wrong = in_flight(engine, expected), controls(engine, expected)
    assert error < TOLERANCE
    assert all(e > SEEN for e in wrong.values()), wrong
    return error, wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_serving_graph_says_the_same(tmp_path: Path, name: str) -> None:
    """By its definition in NumPy, with blocks in random order."""
    family = FAMILIES[name]
    model = tiny.make_model(family.config)
    model.save_pretrained(tmp_path)
    serving = optimize(export(tmp_path, max_seq_len=family.max_seq_len))
    assert interpreted(serving, oracle(model, family, RAGGED)) < TOLERANCE


def interpreted(serving: Graph, expected: Logits) -> float:
    interpreter = Interpreter(serving, num_blocks=48, block_size=4)
    worst = 0.0
    for batch, rows in steps.batches(RAGGED, tiny.VOCAB, steps.paged_tables(RAGGED, 4, 48), steps.all_rows):
        truth = np.array([expected[b][i] for b, i in rows])
        worst = max(worst, worst_error(interpreter.step(steps.feeds(batch)), truth))
    return worst


def record(name: str, error: float, wrong: dict[str, float]) -> None:
    if folder := os.environ.get("LLMLAB_RECORD"):
        measured: dict[str, Any] = {
            "family": name,
            "features": FAMILIES[name].features,
            "error": error,
            "control": min(wrong.values()),
            "decode_steps": max(sum(count == 1 for count in chunks) for chunks in PREEMPTED.chunks),
        }
        (Path(folder) / f"{list(FAMILIES).index(name)}.json").write_text(json.dumps(measured))
