"""The sampling kernels against the host's sampler: on the GPU where there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llmlab.kernels.gpu import launch_sampling  # noqa: E402 (the interpreter is chosen when triton is imported)
from llmlab.kernels.gpu.geometry import SamplingGrid  # noqa: E402
from llmlab.runtime.params import SamplingParams  # noqa: E402
from llmlab.runtime.sampler import draw  # noqa: E402

ROUNDING = 1e-5  # how far from the boundary between two tokens `u` may be told to lie by float32 weights
LAST = 1 - 2.0**-24  # the largest float32 below 1
TILE = 64  # small, so that small rows have several


class Row(NamedTuple):
    logits: Any  # [vocab]
    u: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def right(row: Row) -> set[int]:
    """The tokens that the host's sampler gives for numbers that can't be told from `u`; -1 where no largest logit is finite."""
    logits = np.asarray(row.logits, np.float32)
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        return {-1}
    if row.temperature == 0:
        return {best}
    params = SamplingParams(temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    return {draw(logits, logits[best], params, min(max(row.u + d, 0.0), LAST)) for d in (-ROUNDING, 0.0, ROUNDING)}


def sampled(
    rows: list[Row], splits: int = 1, *, tile: int = TILE, dtype: Any = torch.float32, drawn: bool = True
) -> list[int]:
    grid = SamplingGrid(len(rows), len(rows[0].logits), splits, tile)
    logits = torch.tensor(np.stack([r.logits for r in rows]), dtype=dtype, device=DEVICE)
    u, temperature, top_k, top_p, min_p = (
        torch.tensor(column, dtype=kind, device=DEVICE)
        for column, kind in zip(
            list(zip(*(r[1:] for r in rows), strict=True)),
            (torch.float32, torch.float32, torch.int32, torch.float32, torch.float32),
            strict=True,
        )
    )
    tokens = torch.full((len(rows),), -99, dtype=torch.int32, device=DEVICE)
    scratch = launch_sampling.scratch(grid, DEVICE)
    launch_sampling.sample(grid, tokens, logits, temperature, top_k, top_p, min_p, u, scratch, drawn=drawn)
    return [int(t) for t in tokens.cpu()]


def wrong_rows(rows: list[Row], tokens: list[int]) -> list[int]:
    return [i for i, (row, token) in enumerate(zip(rows, tokens, strict=True)) if token not in right(row)]


def normal(seed: int, vocab: int = 200, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def edited(logits: np.ndarray, values: dict[int, float]) -> np.ndarray:
    logits = logits.copy()
    logits[list(values)] = list(values.values())
    return logits


def falling(seed: int) -> np.ndarray:
    """The most likely token first: with `u` just below 1 the token is the least likely that is kept."""
    return np.sort(normal(seed))[::-1].copy()


FLAT = np.zeros(200, np.float32)
STEPS = np.repeat(np.float32([0.0, -1.0, -2.0, -3.0]), 50)  # ties of 50
FEW = np.full(200, -np.inf, np.float32)
FEW[[3, 70, 199]] = [2.0, 1.5, 1.0]
TAIL = np.repeat(
    np.log(np.float32([1.0, 0.01, 0.0012])), [1, 100, 99]
)  # 99 too unlikely to be the cut, but not nothing
ALWAYS = {
    "greedy, the first of three largest": Row(edited(FLAT, {70: 5.0, 134: 5.0, 150: 5.0}), temperature=0.0),
    "greedy, not a number": Row(edited(normal(1), {130: np.nan}), temperature=0.0),
    "drawn, not a number": Row(edited(normal(1), {3: np.nan}), top_k=4, top_p=0.5),
    "nothing but -infinity": Row(np.full(200, -np.inf, np.float32), top_k=3, top_p=0.9),
    "temperature alone": Row(normal(2), 0.37, 0.8),
    "u is 0, the first tokens are cut": Row(falling(3)[::-1], 0.0, top_k=5),
    "u is just below 1": Row(edited(normal(4), {199: -np.inf}), LAST),
    "one token has all mass": Row(edited(FLAT, {77: 200.0}), LAST, top_p=0.99),
    "top_k of 1": Row(falling(5), LAST, 2.0, top_k=1),
    "top_k above the tokens that are possible": Row(FEW, 0.8, top_k=50),
    "top_p is tiny": Row(falling(7), LAST, 3.0, top_p=1e-6),
    "top_p of what top_k leaves": Row(STEPS, LAST, top_k=60, top_p=0.6),
    "top_p of all, the unlikely too": Row(TAIL, LAST, top_p=0.5),
    "min_p": Row(STEPS, LAST, min_p=0.2),
    "all of them": Row(normal(8), 0.95, 1.7, top_k=40, top_p=0.8, min_p=0.05),
    "all equal, top_p": Row(FLAT, 0.42, top_p=0.5),
}
NIGHTLY = {
    "greedy, a lone last token": Row(edited(normal(1), {199: 99.0}), temperature=0.0),
    "infinity": Row(edited(normal(1), {199: np.inf})),
    "u is 0": Row(edited(normal(3), {0: -np.inf}), 0.0),
    "u is just below 1, the last tokens are cut": Row(falling(4), LAST, top_p=0.4),
    "top_k of 1, two largest": Row(edited(normal(5), {20: 9.0, 180: 9.0}), 0.9, top_k=1),
    "top_k inside a tie": Row(STEPS, LAST, top_k=60),
    "top_k at the end of a tie": Row(STEPS, LAST, top_k=100),
    "top_k of all but one": Row(falling(6), LAST, top_k=199),
    "top_k of the whole vocabulary": Row(falling(6), LAST, top_k=200),
    "top_k above the vocabulary": Row(falling(6), LAST, top_k=10**6),
    "top_p inside a tie": Row(STEPS, LAST, top_p=0.8),
    "top_p of tokens that are possible": Row(FEW, LAST, top_p=0.7),
    "min_p of 1": Row(STEPS, LAST, min_p=1.0),
    "all equal, top_k": Row(FLAT, 0.99, top_k=7),
    "so cold that weights vanish": Row(falling(8), LAST, 0.001, top_k=100, top_p=0.99),
    "so hot that all are nearly equal": Row(falling(8), LAST, 100.0, top_k=100, top_p=0.5),
}
only_nightly = pytest.param(NIGHTLY, id="nightly", marks=pytest.mark.slow if DEVICE == "cpu" else ())


@pytest.mark.parametrize("rows", [pytest.param(ALWAYS, id="always"), only_nightly])
def test_the_token_is_that_of_the_host(rows: dict[str, Row]) -> None:
    wrong = wrong_rows(list(rows.values()), sampled(list(rows.values())))
    assert [list(rows)[i] for i in wrong] == []


some_rows = st.lists(
    st.builds(
        Row,
        st.builds(normal, st.integers(0, 1000), st.just(150), st.sampled_from([0.01, 1.0, 8.0])),
        st.one_of(st.sampled_from([0.0, LAST]), st.floats(0, LAST, width=32)),
        st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        st.sampled_from([0, 1, 2, 7, 149, 150]),
        st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        st.sampled_from([0.0, 0.1, 0.9]),
    ),
    min_size=1,
    max_size=6 if DEVICE == "cuda" else 3,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=200 if DEVICE == "cuda" else 3)
@given(some_rows, st.integers(1, 2))
def test_any_mix_of_rows(rows: list[Row], splits: int) -> None:
    assert wrong_rows(rows, sampled(rows, splits)) == []


def test_rows_that_are_all_greedy_need_no_more_than_two_launches() -> None:
    ties = edited(normal(0, 3000), {1500: 99.0, 2600: 99.0})
    rows = [Row(logits, temperature=0.0) for logits in (ties, normal(1, 3000))]
    assert wrong_rows(rows, sampled(rows, 3, tile=1024, drawn=False)) == []


def test_half_precision_logits() -> None:
    rows = [
        Row(normal(9).astype(np.float16), 0.6, top_k=20, top_p=0.7),
        Row(normal(10).astype(np.float16), temperature=0.0),
    ]
    assert wrong_rows(rows, sampled(rows, dtype=torch.float16)) == []


@pytest.mark.parametrize("ignored", ["top_k", "top_p", "min_p"])
def test_a_filter_that_does_nothing_is_seen(ignored: str) -> None:
    used, off = {"top_k": (30, 0), "top_p": (0.4, 1.0), "min_p": (0.5, 0.0)}[ignored]
    row = Row(STEPS, LAST)._replace(**{ignored: used})
    assert wrong_rows([row], sampled([row._replace(**{ignored: off})])) == [0]


def test_a_top_p_that_is_a_little_off_is_seen() -> None:
    row = Row(falling(11), LAST, top_p=0.5)
    assert wrong_rows([row], sampled([row._replace(top_p=0.51)])) == [0]
    assert wrong_rows([row], sampled([row])) == []


def test_each_program_has_a_whole_tile_and_small_batches_fill_the_card() -> None:
    assert SamplingGrid.fill(1, 128256, 132).splits == 62
    assert SamplingGrid.fill(1, 262144, 132).splits == 64
    assert SamplingGrid.fill(64, 128256, 132).splits == 17
    assert SamplingGrid.fill(256, 32000, 132).splits == 5
    assert SamplingGrid.fill(1, 50, 132).splits == 1


only_on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="too large for Triton's interpreter; a GPU is needed")


def large_rows(vocab: int, count: int) -> list[Row]:
    rng = np.random.default_rng(vocab)
    kinds = [
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 50},
        {"top_k": 5000, "top_p": 0.95, "temperature": 0.7},
        {"min_p": 0.02},
        {},
    ]
    return [
        Row(
            normal(seed, vocab, rng.uniform(0.5, 6)),
            float(np.float32(rng.uniform(0, LAST))),
            **kinds[seed % len(kinds)],
        )
        for seed in range(count)
    ]


@only_on_a_gpu
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 262144])
def test_large_vocabularies_however_they_are_cut(vocab: int) -> None:
    rows = large_rows(vocab, 48)
    first = sampled(rows, 1, tile=2048)
    assert wrong_rows(rows, first) == []
    for splits in (3, min(64, vocab // 2048)):
        assert sampled(rows, splits, tile=2048) == first
    assert sampled(rows[5:6], 7, tile=2048) == first[5:6]  # nor does it depend on the neighbours


@only_on_a_gpu
def test_a_captured_graph_reads_what_kind_each_row_is() -> None:
    rows = large_rows(32000, 12)
    grid = SamplingGrid.fill(12, 32000, 132)
    scratch = launch_sampling.scratch(grid, DEVICE)

    def columns(rows: list[Row]) -> list[Any]:
        kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float32)
        values = zip(*((r.temperature, r.top_k, r.top_p, r.min_p, r.u) for r in rows), strict=True)
        return [torch.tensor(v, dtype=k, device=DEVICE) for v, k in zip(values, kinds, strict=True)]

    logits = torch.tensor(np.stack([r.logits for r in rows]), device=DEVICE)
    tokens = torch.full((12,), -99, dtype=torch.int32, device=DEVICE)
    given = columns(rows)
    launch_sampling.sample(grid, tokens, logits, *given, scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_sampling.sample(grid, tokens, logits, *given, scratch)
    for shift in range(3):
        others = [r._replace(logits=rows[i].logits) for i, r in enumerate(rows[shift:] + rows[:shift])]
        for into, values in zip(given, columns(others), strict=True):
            into.copy_(values)
        tokens.fill_(-99)
        graph.replay()
        assert wrong_rows(others, [int(t) for t in tokens.cpu()]) == []
