"""Random traffic on a TensorRT engine whose GPU ONNX Runtime and NumPy play: the same tokens as alone on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Store
from fake_tensorrt import NO_KERNELS, fake_gpu
from hypothesis import Phase, given, settings
from test_traffic import FEW, STEP, TOLERANCE, Alone, Broken, busy, forgetful, play, scenario, swapped
from tiny import VOCAB

import llmlab as ll

POOLS = {1: 4, 2: 7, 5: 12}
"""Blocks of 16 tokens for so many sequences: not enough for all at their longest, so that some are preempted."""


@pytest.fixture(scope="module")
def alone(store: Store) -> Alone:
    def make(path: Path) -> None:
        ll.build(store.serving("llama"), path, max_tokens_per_step=STEP)

    return Alone(ll.Engine.load(store.once("llama.traffic.engine", make)))


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(4)
    return [tuple(int(t) for t in rng.integers(3, VOCAB, n)) for n in (1, 2, 15, 16, 17, 31, 32, 33, 38)]


@pytest.fixture(scope="module")
def backends(store: Store) -> Iterator[dict[int, Any]]:
    config = ll.BuildConfig(
        precision="float32", block_size=16, max_batch=5, max_tokens_per_step=STEP, compute_capabilities=((9, 0),)
    )
    with fake_gpu() as gpu:
        gpu.driver.calls = _Forgetting()

        def make(path: Path) -> None:
            ll.build(store.serving("llama"), path, target="tensorrt", config=config, kernels=NO_KERNELS)

        engine = ll.Engine.load(store.once("llama.traffic.tensorrt", make))
        yield {n: engine.backend(max_num_seqs=n, kv_blocks=blocks) for n, blocks in POOLS.items()}


class _Forgetting(list):
    def append(self, call: object) -> None: ...


tight = scenario.map(lambda case: {**case, "preempted": []})
"""Here the small pools preempt: the test may not, while a step is in flight."""


@settings(parent=FEW, max_examples=8, phases=[Phase.generate])
@given(case=tight)
def test_requests_get_what_they_get_alone(case: dict, backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play(case, backends[case["slots"]], prompts, alone)
    assert differ == 0 and worst <= TOLERANCE


@pytest.mark.slow
@settings(parent=FEW, max_examples=300)
@given(case=tight)
def test_much_traffic(case: dict, backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play(case, backends[case["slots"]], prompts, alone)
    assert differ == 0 and worst <= TOLERANCE


@pytest.mark.parametrize("change", [swapped, forgetful])
def test_broken_steps_are_noticed(change: Any, backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play({**busy(), "preempted": []}, Broken(backends[5], change), prompts, alone)  # type: ignore[arg-type]
    assert worst > 10 * TOLERANCE or differ > 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_that_the_device_chooses(temperature: float, backends: dict, prompts: list, store: Store) -> None:
    params = [ll.SamplingParams(max_tokens=12, temperature=temperature, seed=i, top_k=40) for i in range(len(prompts))]
    path = store.folder / "llama.traffic.tensorrt"
    with (
        ll.LLM(path, max_num_seqs=5, kv_blocks=POOLS[5]) as device,
        ll.LLM(store.folder / "llama.traffic.engine") as host,
    ):
        got, want = (llm.generate([list(p) for p in prompts], params, progress=False) for llm in (device, host))
    assert [r.token_ids for r in got] == [r.token_ids for r in want]
