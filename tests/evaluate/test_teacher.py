"""Teacher-forced logits through a backend: every token, in order, whatever the chunks, slots and blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Store
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.errors import EngineError, InputError
from llmlab.evaluate.samples import Sample
from llmlab.evaluate.teacher import teacher_forced
from llmlab.runtime.batch import StepBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from toy import ToyBackend, true_logits


def sample(ids: list[int], first: int = 1) -> Sample:
    return Sample(np.array(ids, np.int64), first, None)


def collect(backend: ToyBackend, samples: list[Sample], rows: int) -> dict[tuple[int, int], np.ndarray]:
    found = {}
    order = []
    for number, place, logits in teacher_forced(backend, samples, rows=rows):
        for i, row in enumerate(logits):
            assert (number, place + i) not in found, "a token came up twice"
            found[number, place + i] = row.copy()
            order.append((number, place + i))
    assert order == sorted(order)
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Sample], int, dict[str, int]]:
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=8))
    ids = [draw(st.lists(st.integers(0, 31), min_size=n, max_size=n)) for n in lengths]
    samples = [sample(row, draw(st.integers(1, len(row) - 1))) for row in ids]
    sizes = {"block_size": draw(st.sampled_from([4, 16, 64])), "max_tokens_per_step": draw(st.integers(1, 64))}
    sizes["num_blocks"] = 64 // sizes["block_size"] * draw(st.integers(1, 9))
    return samples, draw(st.integers(1, 64)), sizes


@settings(max_examples=60, deadline=None)
@given(cases())
def test_all_rows_are_those_of_the_oracle(case: tuple[list[Sample], int, dict[str, int]]) -> None:
    samples, rows, sizes = case
    found = collect(ToyBackend(**sizes), samples, rows)
    wanted = {(n, p) for n, s in enumerate(samples) for p in range(s.first, len(s.ids))}
    assert set(found) == wanted
    for number, place in wanted:
        expected = true_logits(samples[number].ids[:place].tolist(), 32)
        np.testing.assert_array_equal(found[number, place], expected)


def test_the_oracle_sees_a_wrong_step() -> None:
    class LateTokens(ToyBackend):
        def run_row(self, batch: StepBatch, b: int, states: np.ndarray) -> None:
            batch.input_ids[batch.query_start[b]] ^= batch.query_start[b] > 0  # the second sequence of a step
            super().run_row(batch, b, states)

    samples = [sample([1, 2, 3]), sample([4, 5, 6])]
    found = collect(LateTokens(), samples, 64)
    assert (found[0, 2] == true_logits([1, 2], 32)).all() and not (found[1, 2] == true_logits([4, 5], 32)).all()


def test_short_sequences_share_steps() -> None:
    backend = ToyBackend(num_blocks=128)
    collect(backend, [sample([1, 2, 3, 4, 5])] * 16, 64)
    assert backend.steps == 2 and backend.tokens == 64


def test_what_does_not_fit_is_said() -> None:
    backend = ToyBackend()
    for bad, message in (
        (sample([1] * 65), "sample 1 has 65 tokens, the engine holds 64"),
        (sample([1, 32]), "sample 1 has token 32, the engine's vocabulary is 32"),
    ):
        with pytest.raises(InputError, match=message):
            collect(backend, [sample([1, 2]), bad], 64)

    class Broken(ToyBackend):
        def execute(self, batch: StepBatch) -> np.ndarray:
            logits = super().execute(batch)
            logits[3, 5] = np.nan
            return logits

    with pytest.raises(EngineError, match="after token 1 of sample 1 are not finite"):
        collect(Broken(), [sample([1, 2, 3]), sample([4, 5, 6, 7])], 64)


def test_of_an_engine_they_are_those_of_transformers(store: Store) -> None:
    import torch

    from llmlab.runtime.engine import Engine

    engine = Engine.load(store.engine("llama"))
    random = np.random.default_rng(0)
    samples = [sample(random.integers(3, 96, n).tolist(), max(1, n // 3)) for n in (2, 9, 50, 3, 33, 17)]
    backend = engine.backend(max_num_seqs=3, threads=1)  # 32 tokens a step: the long ones take two
    found = collect(backend, samples, engine.manifest.max_num_seqs)
    backend.close()
    worst = shifted = 0.0
    for number, one in enumerate(samples):
        with torch.no_grad():
            logits = store.model("llama")(torch.from_numpy(one.ids)[None]).logits[0].numpy()
        for place in range(one.first, len(one.ids)):
            worst = max(worst, float(np.abs(found[number, place] - logits[place - 1]).max()))
            shifted = max(shifted, float(np.abs(found[number, place] - logits[place]).max()))
    assert worst < 1e-3 < shifted
