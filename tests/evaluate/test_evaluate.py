"""`ll.evaluate` on engines that are the same, a little off, and wrong; and what an engine costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from altered import noisy, single_steps
from conftest import Store

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.evaluate.accuracy import Evaluation
from llmlab.evaluate.costs import Cost, measure_costs, unfit
from llmlab.evaluate.energy import ProcessorMeter
from llmlab.evaluate.reference import Reference
from llmlab.runtime.manifest import KVLayout, Limits, Manifest
from llmlab.zoo.tasks import examples

IDS = [np.random.default_rng(n).integers(3, 96, 5 + 6 * n).tolist() for n in range(6)]


@pytest.fixture(scope="module")
def altered(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of the small llama: as it is, and with noise of 2 % and of 30 % on its weights."""
    found = {"same": store.engine("llama")}
    folder = tmp_path_factory.mktemp("altered")
    for name, share in (("little", 0.02), ("much", 0.3)):
        found[name] = ll.build(noisy(store.serving("llama"), share), folder / name, max_tokens_per_step=32).path
    return found


@pytest.fixture(scope="module")
def measured(altered: dict[str, Path]) -> dict[str, Evaluation]:
    with Reference(altered["same"], IDS, threads=1) as reference:
        return {name: ll.evaluate(path, reference=reference, threads=1, costs=False) for name, path in altered.items()}


def test_an_engine_is_no_way_from_itself(measured: dict[str, Evaluation]) -> None:
    same = measured["same"].accuracy
    assert same.kl is not None and (same.kl.value, same.kl.low, same.kl.high) == (0, 0, 0)
    assert same.top1 is not None and same.top1.value == 1
    assert same.same_answer is not None and same.same_answer.value == 1
    assert same.tokens == sum(len(ids) - 1 for ids in IDS) and same.sequences == len(IDS)


def test_numbers_are_those_of_single_steps_and_plain_sums(
    altered: dict[str, Path], measured: dict[str, Evaluation]
) -> None:
    first, second = (single_steps(altered[name], IDS) for name in ("same", "little"))
    kl, same = [], []
    for p_rows, q_rows in zip(first, second, strict=True):
        for p, q in zip(p_rows.astype(np.float64), q_rows.astype(np.float64), strict=True):
            log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q))
            kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
            same.append(p.argmax() == q.argmax())
    little = measured["little"].accuracy
    assert little.kl is not None and little.top1 is not None
    assert little.kl.value == pytest.approx(np.mean(kl), rel=1e-3)
    assert little.top1.value == pytest.approx(np.mean(same))


def test_more_noise_is_further_away_and_the_intervals_know_it(measured: dict[str, Evaluation]) -> None:
    little, much = measured["little"].accuracy, measured["much"].accuracy
    assert little.kl is not None and much.kl is not None and much.top1 is not None and little.top1 is not None
    assert little.kl.low and little.kl.high and much.kl.low
    assert 0 < little.kl.low < little.kl.high < much.kl.low
    assert much.top1.value < little.top1.value < 1
    assert much.first_difference is not None and little.first_difference is not None
    assert much.first_difference.value <= little.first_difference.value


def test_a_wrong_reference_is_noticed(altered: dict[str, Path], measured: dict[str, Evaluation]) -> None:
    found = ll.evaluate(altered["same"], IDS, reference=altered["much"], threads=1, costs=False).accuracy
    assert found.kl is not None and found.kl.value > 0.01 and found.kl.value != measured["much"].accuracy.kl.value  # type: ignore[union-attr]


def test_tinychat_answers_held_out_questions(store: Store, tmp_path: Path) -> None:
    engine = store.engine("tinychat")
    broken = ll.build(noisy(store.serving("tinychat"), 1.0), tmp_path / "broken").path
    good = ll.evaluate(engine, samples=22, threads=1, costs=False)
    assert good.accuracy.kl is None and good.accuracy.exact_match["all"].value > 0.9
    assert set(good.accuracy.exact_match) > {"all", "counting", "arithmetic"}
    assert good.accuracy.bits_per_byte is not None and good.accuracy.bits_per_byte.value < 0.05
    bad = ll.evaluate(broken, samples=22, reference=engine, threads=1, costs=False).accuracy
    assert bad.exact_match["all"].value < 0.6 and bad.bits_per_byte is not None and bad.bits_per_byte.value > 0.1
    assert bad.same_answer is not None and bad.same_answer.value == pytest.approx(bad.exact_match["all"].value, abs=0.1)
    asked = next(e for e in examples("held-out", 11) if len(e.messages) == 1)
    mine = [(asked.prompt, asked.answer), {"prompt": asked.prompt, "answer": "something else", "task": "wrong"}]
    pairs = ll.evaluate(engine, mine, threads=1, costs=False).accuracy.exact_match
    assert (pairs["answers"].value, pairs["wrong"].value, pairs["all"].value) == (1, 0, 0.5)


def test_shown_and_as_data(measured: dict[str, Evaluation]) -> None:
    found = measured["little"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["accuracy"]["kl"]["low"] < data["accuracy"]["kl"]["value"] and data["cost"] is None
    bundle = found._repr_mimebundle_()
    assert "KL to reference" in bundle["text/plain"] and "<table" in bundle["text/html"]


def test_what_cannot_be_evaluated(altered: dict[str, Path], store: Store) -> None:
    with pytest.raises(InputError, match="has a vocabulary of 96, the reference one of 2048"):
        ll.evaluate(altered["same"], [[5, 6, 7]], reference=store.engine("tinychat"), costs=False)
    with pytest.raises(InputError, match="price_per_hour is -1"):
        ll.evaluate(altered["same"], IDS, price_per_hour=-1)
    with pytest.raises(EngineError, match="no such folder"):
        ll.evaluate("nowhere")
    with (
        Reference(altered["same"], IDS, threads=1) as reference,
        pytest.raises(InputError, match="has its data already"),
    ):
        ll.evaluate(altered["same"], IDS, reference=reference)


def test_a_full_disk_is_said_before(altered: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="give fewer samples, or set TMPDIR"):
        Reference(altered["same"], IDS, threads=1)


# costs


def test_costs_of_a_small_engine(altered: dict[str, Path]) -> None:
    from llmlab.runtime.engine import Engine

    engine = Engine.load(altered["same"])
    cost = measure_costs(engine, threads=1, price_per_hour=3.6, repeat=1)
    assert cost.size_bytes == engine.size and [row.batch for row in cost.speed] == [1, 8]
    assert 0 < cost.engine_bytes < cost.peak_bytes and cost.load_s > 0
    assert cost.price_per_million == pytest.approx(1000 / cost.speed[-1].tokens_per_s)
    assert (cost.joules_per_token is None) == (not ProcessorMeter().readable), "never invented"
    assert json.loads(json.dumps(cost.to_dict()))["speed_counts"] is True
    assert "speed, B=8" in cost.facts()
    slower = cost.better(cost)
    assert slower == cost


def test_a_process_that_fails_is_one_line(altered: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from llmlab.runtime.engine import Engine

    copy = tmp_path / "engine"
    shutil.copytree(altered["same"], copy)
    engine = Engine.load(copy)
    (copy / "weights.bin").write_bytes(b"")
    with pytest.raises(EngineError, match=r"measuring its costs failed: .*weights.bin: 0 bytes"):
        measure_costs(engine)


def manifest(target: str, **recipe: object) -> Manifest:
    kv = KVLayout("slots", "float32", 64, ((1, 8),))
    return Manifest(target, "float32", {}, kv, Limits(8, 8), recipe=recipe)


def test_whose_speed_says_nothing() -> None:
    fp8 = {"weights": {"dtype": "fp8"}}
    assert "fp8" in unfit(manifest("onnxruntime", **fp8)) and unfit(manifest("tensorrt", **fp8)) == ""
    assert "fp8" in unfit(manifest("onnxruntime", weights={"dtype": "int8"}, layers={"*.down_proj": fp8}))
    assert (
        unfit(manifest("onnxruntime", weights={"dtype": "int4", "group": 32})) == unfit(manifest("onnxruntime")) == ""
    )


def test_the_better_of_two_measurements() -> None:
    def cost(scale: float) -> Cost:
        from llmlab.speed import BenchRow

        row = BenchRow(1, 8, 4, 10 * scale, 5 * scale, 4 * scale, 3 / scale, 2 / scale, 0.1)
        return Cost(5, 1 / scale, int(9 / scale), int(6 / scale), (row,), None if scale > 1 else 2.0, 7 / scale)

    found = cost(1).better(cost(2))
    assert found.speed == cost(2).speed and found.load_s == 0.5 and found.joules_per_token == 2.0
    assert found == cost(2).better(cost(1))
