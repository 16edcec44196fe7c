"""What calibration sees of a model, against transformers with hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from conftest import Store

from llmlab.errors import InputError
from llmlab.quant.calibrate import batches, logits, observe
from llmlab.quant.observers import AbsMax, StatisticsOf
from llmlab.quant.projections import projections

EVERYTHING = frozenset({"absmax", "meanabs", "sample", "gram"})


def samples(count: int = 9, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 96, n) for n in (1, 64, *rng.integers(2, 60, count - 2))]


def hooked(
    model: Any, modules: list[str], data: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], list[np.ndarray], Any]:
    """The rows that came into `modules` of a transformers model, the logits of each sample, and the last cache."""
    import torch
    from transformers import DynamicCache

    rows: dict[str, list[np.ndarray]] = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: rows[name].append(given[0][0].detach().numpy())
        )
        for name in modules
    ]
    said = []
    for ids in data:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            said.append(model(torch.tensor(ids)[None], past_key_values=cache).logits[0].numpy())
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in rows.items()}, said, cache


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_inputs_of_projections_are_those_of_transformers(store: Store, name: str) -> None:
    graph, data = store.serving(name), samples()
    every = [p for p in projections(graph) if p.layer is not None]
    taps = {p.input.name: StatisticsOf(EVERYTHING) for p in every}
    observe(graph, data, taps, batch_tokens=100)
    expected, said, _ = hooked(store.model(name), [p.name for p in every], data)
    for p in every:
        found, rows = taps[p.input.name].statistics(), expected[p.name]
        assert found.count == len(rows) == sum(map(len, data))
        np.testing.assert_allclose(found.absmax, np.abs(rows).max(0), rtol=1e-4)
        np.testing.assert_allclose(found.meanabs, np.abs(rows).mean(0), rtol=1e-4)
        np.testing.assert_allclose(
            found.gram, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4 * np.abs(rows).max() ** 2
        )
    for ours, theirs in zip(logits(graph, data), said, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_keys_and_values_are_those_of_the_cache(store: Store) -> None:
    graph, data = store.serving("llama"), samples()[1:2]
    taps = {f"kv_cache.1.{what}": StatisticsOf(frozenset({"sample"})) for what in ("key", "value")}
    observe(graph, data, taps)
    _, _, cache = hooked(store.model("llama"), [], data)
    for what, tensor in (("key", cache.layers[1].keys), ("value", cache.layers[1].values)):
        rows = tensor[0].numpy().transpose(1, 0, 2).reshape(len(data[0]), -1)
        np.testing.assert_allclose(taps[f"kv_cache.1.{what}"].statistics().sample, rows, atol=1e-4)


def test_batches_hold_whole_samples_in_order() -> None:
    data = samples(30)
    made = batches(data, 100)
    assert [len(ids) for b in made for ids in b.samples] == [len(ids) for ids in data]
    assert all(sum(b.lengths) <= 100 or len(b.samples) == 1 for b in made) and len(made) < 30
    row = 0
    for b in made:
        for at in range(sum(b.lengths)):
            sample, token = b.place(at)
            assert b.feeds()["input_ids"][at] == data[sample][token]
        row += sum(b.lengths)
    assert row == sum(map(len, data))


def test_memory_does_not_depend_on_the_number_of_samples(store: Store) -> None:
    import gc
    import tracemalloc

    graph = store.serving("llama")
    tap = projections(graph)[1].input.name
    peaks = []
    for count in (8, 8, 160):  # the first fills caches
        data = [np.full(32, 5) for _ in range(count)]
        observer = StatisticsOf(EVERYTHING, rows=64)
        gc.collect()
        tracemalloc.start()
        observe(graph, data, {tap: observer}, batch_tokens=128)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] * 1.2


def test_a_nan_is_named_with_its_layer_and_sample(store: Store) -> None:
    graph, data = store.serving("llama"), samples()
    broken = graph.copy()
    table = next(p for p in projections(broken) if p.role == "embedding")
    weight = table.load()
    weight[50] = np.inf
    table.reader.inputs[table.index] = gs.Constant("damaged", weight)
    for place, ids in enumerate(data):
        ids[ids == 50] = 51
        if place == 5:
            ids[7] = 50
    tap = projections(graph)[1].input.name
    with pytest.raises(
        InputError, match=r"layers.0.input_layernorm.* holds a NaN in calibration sample 5, token 7: the model"
    ):
        observe(broken, data, {tap: AbsMax()})
    observe(graph, data, {tap: AbsMax()})


def test_what_cannot_be_run_is_said(store: Store) -> None:
    graph, data = store.serving("llama"), samples()
    with pytest.raises(InputError, match=r"has no tensor 'logit' to look at \(nearest: logits"):
        observe(graph, data, {"logit": AbsMax()})
    with pytest.raises(InputError, match="nothing to look at"):
        observe(graph, data, {})
    with pytest.raises(InputError, match="sample 1 has the token id 96; the model has 96 tokens"):
        observe(graph, [data[0], np.array([96])], {"logits": AbsMax()})
    with pytest.raises(InputError, match="sample 0 has 65 tokens; the model takes at most 64"):
        observe(graph, [np.ones(65, np.int64)], {"logits": AbsMax()})
    with pytest.raises(InputError, match="is empty, or has an empty sample"):
        observe(graph, [], {"logits": AbsMax()})
    with pytest.raises(InputError, match="optimize the graph first"):
        observe(store.plain("llama"), data, {"logits": AbsMax()})
