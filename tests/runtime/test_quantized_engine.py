"""Engines with quantized weights on ONNX Runtime, step by step against the float32 engine of the same rounded weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Store
from numpy.typing import NDArray
from steps import PREEMPTED, PREEMPTED_SLOTS, RAGGED, Plan, batches

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.quant.grid import Grid
from llmlab.quant.place import place_weight
from llmlab.quant.projections import Projection, projections
from llmlab.quant.rounding import Rounding
from llmlab.runtime.backends import onnxruntime
from llmlab.runtime.manifest import MANIFEST, PREFILL_MODEL, Manifest, Products, digest

Logits = list[NDArray[np.float32]]
GRID = Grid("int4", 16)


def rounded(graph: Graph, grid: Grid = GRID, *, wide: bool = False) -> Graph:
    """A serving graph whose products' weights are rounded; `wide`: float32 numbers that happen to lie on the grid."""
    result = graph.copy()
    edit = Editor(result)
    for projection in projections(result):
        if projection.role != "embedding":
            rounding = Rounding(projection, grid)
            if wide:
                _place_wide(edit, projection, rounding)
            else:
                place_weight(edit, projection, rounding)
    return result


def _place_wide(edit: Editor, projection: Projection, rounding: Rounding) -> None:
    rows = rounding.rounded().dequantize()
    made = edit.constant(f"{projection.name}.rounded", rows if projection.transposed else rows.T)
    projection.reader.inputs[projection.index] = made


def logits(engine: ll.Engine, plan: Plan, slots: list[int]) -> Logits:
    backend = engine.backend(threads=2, max_num_seqs=max(slots) + 1)
    tables = np.array(slots, np.int32)[:, None]
    steps = batches(plan, engine.manifest.config.vocab_size, tables, lambda _, rows: np.arange(rows))
    return [backend.execute(batch).copy() for batch, _ in steps]


def off(found: Logits, expected: Logits) -> float:
    """Root mean square of the differences over that of the expected logits."""
    assert [f.shape for f in found] == [e.shape for e in expected]
    difference = np.concatenate([f - e for f, e in zip(found, expected, strict=True)])
    return float(np.sqrt((difference**2).mean() / (np.concatenate(expected) ** 2).mean()))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def graph(store: Store, request: pytest.FixtureRequest) -> Graph:
    """Without and with biases."""
    found: Graph = store.serving(request.param)
    return found


@pytest.mark.parametrize(("plan", "slots"), [(RAGGED, [3, 0, 4, 1, 2]), (PREEMPTED, PREEMPTED_SLOTS)], ids=["ragged", "again"])  # fmt: skip
def test_logits(graph: Graph, tmp_path: Path, plan: Plan, slots: list[int]) -> None:
    sizes = {"max_seq_len": 64, "max_tokens_per_step": 64}
    expected = logits(ll.build(rounded(graph, wide=True), tmp_path / "wide", **sizes), plan, slots)
    quantized = rounded(graph)
    exact = ll.build(quantized, tmp_path / "exact", accuracy_level=1, **sizes)
    fast = ll.build(quantized, tmp_path / "fast", **sizes)
    both = ll.build(quantized, tmp_path / "both", prefill="int8", **sizes)
    assert [e.manifest.products for e in (exact, fast, both)] == [Products(1), Products(4), Products(4, "int8")]
    assert off(logits(exact, plan, slots), expected) < 1e-5
    found = logits(fast, plan, slots)
    assert 1e-3 < off(found, expected) < 0.05  # activations are rounded to int8, by blocks
    many = logits(both, plan, slots)
    assert 1e-3 < off(many, expected) < 0.08  # and by rows
    steps = zip(found, many, strict=True)
    used = [len(f) >= onnxruntime._MANY_ROWS for f in found]
    assert any(used) and not all(used) and any(not np.array_equal(f, m) for f, m in steps)
    other = logits(ll.build(rounded(graph, Grid("int3", 16)), tmp_path / "other", **sizes), plan, slots)
    assert off(other, expected) > 0.15  # negative control: a bit less in the weights


def test_a_second_form_of_products_is_used_where_rows_are_many(store: Store, tmp_path: Path) -> None:
    engine = ll.build(rounded(store.serving("llama")), tmp_path / "both", prefill="int8", max_seq_len=64)
    backend = engine.backend(threads=1, max_num_seqs=1)
    assert isinstance(backend, onnxruntime.OnnxRuntimeBackend) and backend._many is not backend._session
    plan = Plan(((onnxruntime._MANY_ROWS, onnxruntime._MANY_ROWS - 1, 1),))
    vocab = engine.manifest.config.vocab_size
    for batch, _ in batches(plan, vocab, np.array([[0]], np.int32), lambda _, rows: np.array([rows - 1])):
        backend.execute(batch)
        many = len(batch.input_ids) >= onnxruntime._MANY_ROWS
        assert next(reversed(backend._spans.values())).session is (backend._many if many else backend._session)
    with ll.LLM(engine, threads=1) as llm:
        text = llm.generate([[5, 6, 7] * 6], ll.SamplingParams(max_tokens=4, ignore_eos=True), progress=False)
    assert len(text[0].token_ids) == 4


def test_settings_that_are_none(store: Store, tmp_path: Path) -> None:
    graph = store.serving("llama")
    with pytest.raises(InputError, match="accuracy_level is 2, expected 1"):
        ll.build(rounded(graph), tmp_path / "e", accuracy_level=2)
    with pytest.raises(InputError, match="prefill is 'int4'; available: int8"):
        ll.build(rounded(graph), tmp_path / "e", prefill="int4")
    with pytest.raises(InputError, match="prefill is for weights that alone are quantized"):
        ll.build(graph, tmp_path / "e", prefill="int8")
    with pytest.raises(InputError, match="accuracy_level and prefill are for ONNX Runtime"):
        ll.build(rounded(graph), tmp_path / "e", target="tensorrt", accuracy_level=4)
    assert not (tmp_path / "e").exists()


def test_what_a_manifest_says_of_products(store: Store, tmp_path: Path) -> None:
    assert ll.Engine.load(store.engine("llama")).manifest.products is None
    engine = ll.build(rounded(store.serving("llama")), tmp_path / "e", prefill="int8", max_seq_len=64)
    assert ll.Engine.load(engine.path).manifest.products == Products(4, "int8")
    assert "accuracy level 4, prefill in int8" in engine._repr_mimebundle_()["text/html"]
    sizes = engine.manifest.files
    assert sizes["prefill.bin"]["size"] < sizes["weights.bin"]["size"]  # the embedding is shared
    path = engine.path / MANIFEST
    for change, message in (
        ({"products": {"accuracy_level": 3, "prefill": ""}}, "malformed"),
        ({"products": {"accuracy_level": 4}}, "malformed"),
        ({"files": {k: v for k, v in sizes.items() if k != PREFILL_MODEL}}, f"lists no {PREFILL_MODEL}"),
    ):
        body = Manifest.read(engine.path).to_dict() | change
        whole = json.loads(json.dumps(body))
        before = path.read_text()
        path.write_text(json.dumps(whole | {"sha256": digest(whole)}))
        with pytest.raises(EngineError, match=message):
            ll.Engine.load(engine.path)
        path.write_text(before)
