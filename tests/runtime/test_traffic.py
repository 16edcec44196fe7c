"""Random traffic on the real engine of tinychat: what a request gets is what it gets alone."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from conftest import Store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab import demo
from llmlab.runtime.batch import Backend, StepBatch
from llmlab.runtime.core import EngineCore
from llmlab.runtime.engine import Engine
from llmlab.runtime.params import SamplingParams
from llmlab.runtime.request import Request
from llmlab.text.tokenizer import Tokenizer
from llmlab.zoo.tasks import examples

TOLERANCE = 2e-4  # of a log-probability; float32 sums in another order
STEP = 64


@pytest.fixture(scope="module")
def engine(store: Store) -> Engine:
    return Engine.load(store.demo() / demo.ENGINE)


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer(engine.path)
    asked = [e.messages for e in examples("held-out", 44, seed=3)]
    ids = [tuple(tokenizer.encode_chat(messages, {})[1]) for messages in asked]
    return [(5,), *sorted({i[:160] for i in ids}, key=len)]  # a prompt of one token, and long ones cut short


class Alone:
    """Each request by itself on a slot of its own: the oracle."""

    def __init__(self, engine: Engine) -> None:
        self._backend = engine.backend(threads=1, max_num_seqs=1)
        self.eos = engine.manifest.eos_token_ids
        self.run = lru_cache(maxsize=None)(self._run)

    def _run(self, prompt: tuple[int, ...], params: SamplingParams) -> tuple[list[int], list[float]]:
        core = EngineCore(self._backend, max_num_seqs=1, max_tokens_per_step=STEP, eos_token_ids=self.eos)
        core.add(Request("alone", prompt, params, 0.0))
        return collect(core)["alone"]


def collect(core: EngineCore) -> dict[str, tuple[list[int], list[float]]]:
    got: dict[str, tuple[list[int], list[float]]] = {}
    while core.has_work:
        take(core, got)
    return got


def take(core: EngineCore, got: dict[str, tuple[list[int], list[float]]]) -> None:
    for update in core.step():
        ids, logprobs = got.setdefault(update.request_id, ([], []))
        ids += update.token_ids
        logprobs += [entry.logprob for entry in update.logprobs or ()]
    core.check_integrity()


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Alone:
    return Alone(engine)


@pytest.fixture(scope="module")
def backends(engine: Engine) -> dict[int, Backend]:
    return {slots: engine.backend(threads=1, max_num_seqs=slots) for slots in (1, 2, 5)}


request = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, 40),
        "arrives": st.integers(0, 30),
        "cancelled": st.none() | st.integers(0, 40),
        "max_tokens": st.integers(1, 24),
        "sampled": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
scenario = st.fixed_dictionaries(
    {
        "requests": st.lists(request, min_size=1, max_size=9),
        "slots": st.sampled_from([1, 2, 5]),
        "budget": st.integers(5, STEP),
        "prefix_cache": st.booleans(),
        "preempted": st.lists(st.integers(1, 30), max_size=3),
    }
)


def play(case: dict[str, Any], backend: Backend, prompts: list, alone: Alone) -> tuple[float, int]:
    """Run a scenario. The largest difference of a log-probability, and the number of requests whose tokens differ."""
    core = EngineCore(
        backend,
        max_num_seqs=case["slots"],
        max_tokens_per_step=case["budget"],
        eos_token_ids=alone.eos,
        prefix_cache=case["prefix_cache"],
    )
    wanted, got = {}, {}
    for i, one in enumerate(case["requests"]):
        params = SamplingParams(
            max_tokens=one["max_tokens"], temperature=0.8 if one["sampled"] else 0.0, seed=one["seed"], logprobs=0
        )
        wanted[f"r{i}"] = (prompts[one["prompt"] % len(prompts)], params)
    now = 0
    while core.has_work or any(one["arrives"] >= now for one in case["requests"]):
        for i, one in enumerate(case["requests"]):
            if one["arrives"] == now:
                core.add(Request(f"r{i}", *wanted[f"r{i}"], 0.0))
            elif one["cancelled"] == now:
                core.cancel(f"r{i}")
        if now in case["preempted"] and core._scheduler.running:
            core._scheduler.preempt(core._scheduler.running[-1], keep_blocks=False)
        take(core, got)
        now += 1
    worst, differ = 0.0, 0
    for i, one in enumerate(case["requests"]):
        ids, logprobs = got[f"r{i}"]
        ids_alone, logprobs_alone = alone.run(*wanted[f"r{i}"])
        if one["cancelled"] is None:
            assert len(ids) == len(ids_alone) or ids != ids_alone[: len(ids)]
        differ += ids != ids_alone[: len(ids)]
        common = next((k for k, (a, b) in enumerate(zip(ids, ids_alone, strict=False)) if a != b), len(ids))
        worst = max([worst, *(np.abs(np.subtract(logprobs[:common], logprobs_alone[:common])))])
    return worst, differ


FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FEW
@given(case=scenario)
def test_requests_get_what_they_get_alone(case: dict, backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play(case, backends[case["slots"]], prompts, alone)
    assert differ == 0 and worst <= TOLERANCE


@pytest.mark.slow
@settings(parent=FEW, max_examples=400)
@given(case=scenario)
def test_much_traffic(case: dict, backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play(case, backends[case["slots"]], prompts, alone)
    assert differ == 0 and worst <= TOLERANCE


def busy() -> dict[str, Any]:
    """Nine requests at once in five slots, with a preemption: what the controls are played on."""
    one = {"arrives": 0, "cancelled": None, "max_tokens": 12, "sampled": False, "seed": 1}
    many = [{**one, "prompt": 3 * i, "arrives": i % 4} for i in range(9)]
    return {"requests": many, "slots": 5, "budget": 40, "prefix_cache": False, "preempted": [3]}


class Broken:
    """A backend that gets a step slightly wrong."""

    def __init__(self, backend: Backend, change: Any) -> None:
        self._backend, self._change, self.limits = backend, change, backend.limits

    def execute(self, batch: StepBatch) -> np.ndarray:
        return self._backend.execute(self._change(batch))

    def release(self, blocks: Any) -> None:
        self._backend.release(blocks)


def swapped(batch: StepBatch) -> StepBatch:
    """The first two sequences in each other's slots, in steps of decodes."""
    if len(batch.kv_len) < 2 or len(batch.input_ids) > len(batch.kv_len):
        return batch
    return replace(batch, block_table=batch.block_table[[1, 0, *range(2, len(batch.kv_len))]])


def forgetful(batch: StepBatch) -> StepBatch:
    """One key too few, in steps of decodes."""
    return batch if len(batch.input_ids) > len(batch.kv_len) else replace(batch, kv_len=np.maximum(batch.kv_len - 1, 1))


def test_the_busy_case_is_right(backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play(busy(), backends[5], prompts, alone)
    assert differ == 0 and worst <= TOLERANCE


@pytest.mark.parametrize("change", [swapped, forgetful])
def test_broken_steps_are_noticed(change: Any, backends: dict, prompts: list, alone: Alone) -> None:
    worst, differ = play(busy(), Broken(backends[5], change), prompts, alone)  # type: ignore[arg-type]
    assert worst > 10 * TOLERANCE or differ > 0
