"""Steps in parts: the choice by bytes, at the sizes where it tips."""

from __future__ import annotations

import numpy as np

from llmlab.runtime.backends.partition import CostModel


def parts(new: list[int], slots: list[int], weights: int, row: int = 1) -> list[tuple[int, int]]:
    return CostModel(weights, row).parts(np.array(new, np.int32), np.array(slots, np.int32))


def test_decodes_alone_run_at_once() -> None:
    assert parts([1, 1, 1], [0, 1, 2], weights=1) == [(0, 3)]


def test_one_prompt_runs_at_once() -> None:
    assert parts([128], [5], weights=1) == [(0, 1)]


def test_dear_weights_keep_a_mixed_step_together() -> None:
    assert parts([1, 1, 64], [0, 1, 2], weights=10**9) == [(0, 3)]


def test_dear_padding_parts_decodes_from_the_chunk() -> None:
    assert parts([1, 1, 64], [0, 1, 2], weights=1) == [(0, 2), (2, 3)]


def test_the_choice_tips_where_the_bytes_are_equal() -> None:
    padding = 3 * (3 * 64 - 66)  # three passes over the padded rows of the run that would do all
    assert parts([1, 1, 64], [0, 1, 2], weights=padding + 1) == [(0, 3)]
    assert parts([1, 1, 64], [0, 1, 2], weights=padding - 1) == [(0, 2), (2, 3)]


def test_chunks_of_one_length_stay_together() -> None:
    assert parts([1, 32, 32], [0, 1, 2], weights=10) == [(0, 1), (1, 3)]


def test_idle_slots_between_count_as_padding() -> None:
    assert parts([1, 32, 32], [0, 1, 9], weights=10) == [(0, 1), (1, 2), (2, 3)]


def test_parts_cover_every_sequence_once_and_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 9))
        new = rng.choice([1, 1, 1, 7, 64], count).tolist()
        ranges = parts(new, rng.permutation(16)[:count].tolist(), weights=int(rng.integers(1, 5000)))
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
        assert ranges[-1][1] == count
