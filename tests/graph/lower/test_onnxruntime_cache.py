"""Quantized KV caches on ONNX Runtime against their definition in NumPy, over ragged steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
from attention_forms import FORMS, LARGE, PLAN, VOCAB, form, quantized, reference, worst
from small_graphs import run
from steps import PREEMPTED, PREEMPTED_SLOTS, RAGGED, Plan

from llmlab.build import build
from llmlab.errors import InputError
from llmlab.evaluate.costs import unfit
from llmlab.graph.graph import Graph
from llmlab.graph.lower import onnxruntime_attention as lowering
from llmlab.graph.lower.onnxruntime import lower
from llmlab.quant.kv_scales import CACHES, Scales, place_scales
from llmlab.runtime.batch import BlockCopy
from llmlab.runtime.engine import Engine

TOLERANCE = 5e-3  # a key at the edge between two numbers may fall to either side: RoPE differs by a last bit
SEEN = 10 * TOLERANCE

KINDS = [
    ("rope", "int8", "tensor"),
    ("rope", "int8", "channel"),
    ("interleaved", "int4", "head"),
    ("one kv head", "int4", "tensor"),
    ("partial", "int8", "head"),
    ("small partial", "int8", "channel"),
    ("odd head, rope", "int8", "tensor"),
    ("odd head", "int4", "channel"),
    ("sinks, window, softcap, rope", "int8", "head"),
    ("sinks, window, softcap, rope", "fp8", "channel"),
    ("rope", "fp8", "tensor"),
    ("alibi, odd head", "fp8", "head"),
    ("alibi", "int8", "tensor"),
    ("alibi, odd head", "int8", "channel"),
    ("alibi, rope, window", "int4", "head"),
    ("head of 64", "int4", "head"),
]


def execute(
    engine: Engine, spoil: Any = None, plan: Plan = PLAN, slots: Sequence[int] = (4, 1, 0, 6)
) -> list[np.ndarray]:
    backend = engine.backend(threads=1, max_num_seqs=8)
    for layer in backend._pool.layers:
        layer[:] = np.nan if layer.dtype == np.float32 else 0x7F
    tables = steps.slot_tables(plan, slots)
    batches = [b for b, _ in steps.batches(plan, VOCAB, tables, steps.all_rows)]
    found = [backend.execute(b if spoil is None else spoil(b)).copy() for b in batches]
    backend.close()
    return found


@pytest.mark.parametrize(("name", "cache", "per"), KINDS)
def test_every_cache_equals_the_reference(tmp_path: Path, name: str, cache: str, per: str) -> None:
    graph = quantized((FORMS | LARGE)[name], cache, per)
    expected = reference(graph)
    assert worst(execute(build(graph, tmp_path / "e", max_tokens_per_step=32)), expected) < TOLERANCE
    assert worst(reference(form((FORMS | LARGE)[name])), expected) > TOLERANCE, "rounding is seen"


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_scores_in_tiles_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    graph = quantized({"rotary": 16}, cache, "head")
    found = []
    for most in (1 << 25, 0):
        monkeypatch.setattr(lowering, "_MOST_SCORES", most)
        node = next(n for n in lower(graph, capacity=64, max_tokens=32).surgeon.nodes if n.op == "GroupQueryAttention")
        assert (node.attrs["scale"], bool(node.inputs[11].name)) == (0.3, most > 0)
        found.append(execute(build(graph, tmp_path / str(most), max_tokens_per_step=32)))
        assert worst(found[-1], reference(graph)) < TOLERANCE
    assert 0 < worst(*found) < 1e-5, "two ways to compute"


@pytest.mark.parametrize("cache", ["int8", "int4"])
@pytest.mark.parametrize(
    ("plan", "slots"), [(RAGGED, [3, 0, 5, 2, 6]), (PREEMPTED, PREEMPTED_SLOTS)], ids=["a full cache", "a lost slot"]
)
def test_a_full_cache_and_a_lost_slot(tmp_path: Path, cache: str, plan: Plan, slots: list[int]) -> None:
    graph = quantized(FORMS["rope"], cache, "head")
    engine = build(graph, tmp_path / "e", max_tokens_per_step=64)
    assert worst(execute(engine, plan=plan, slots=slots), reference(graph, plan)) < TOLERANCE


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_a_prefix_is_copied_and_what_is_let_go_reads_as_zeros(tmp_path: Path, cache: str) -> None:
    engine = build(quantized(FORMS["rope"], cache, "head"), tmp_path / "e", max_tokens_per_step=32)
    backend = engine.backend(threads=1, max_num_seqs=6)
    first, second = (b for b, _ in steps.batches(Plan(((10, 2),)), VOCAB, np.array([[3]], np.int32), steps.all_rows))
    backend.execute(first)
    alone = backend.execute(second).copy()
    other = replace(second, block_table=np.array([[5]], np.int32))
    np.testing.assert_array_equal(backend.execute(replace(other, copies=(BlockCopy(3, 5, 10),))), alone)
    short = backend.execute(replace(other, block_table=np.array([[4]], np.int32), copies=(BlockCopy(3, 4, 9),)))
    assert np.abs(short - alone).max() > 0.01, "a copy that is one token short is seen"
    backend.release([3])
    (layer,) = backend._pool.layers
    assert not layer[:, 3].any() and layer[:, 5, :, :12].any()
    backend.close()


@pytest.mark.parametrize("cache", CACHES)
def test_a_wrong_scale_is_seen(tmp_path: Path, cache: str) -> None:
    """One that is too small, so that keys are clipped; one that is a little too large only rounds elsewhere."""
    engine = build(quantized(FORMS["rope"], cache, "tensor", 0.3), tmp_path / "e", max_tokens_per_step=32)
    assert worst(execute(engine), reference(quantized(FORMS["rope"], cache, "tensor"))) > SEEN


def test_a_wrong_slot_is_seen(tmp_path: Path) -> None:
    graph = quantized(FORMS["rope"], "int4", "head")
    engine = build(graph, tmp_path / "e", max_tokens_per_step=32)
    assert worst(execute(engine, steps.traded_slots), reference(graph)) > SEEN


@pytest.mark.parametrize(
    ("cache", "dtype", "rounding", "size"),
    [("int8", "int8", "", 64), ("int4", "int4", "", 32), ("fp8", "float32", "float8_e4m3fn", 256)],
)
def test_the_manifest_says_what_the_cache_is(tmp_path: Path, cache: str, dtype: str, rounding: str, size: int) -> None:
    build(quantized(FORMS["rope"], cache, "head"), tmp_path / "e")
    engine = Engine.load(tmp_path / "e")
    kv = engine.manifest.kv
    assert (kv.dtype, kv.rounding, kv.bytes_per_token, kv.layers) == (dtype, rounding, size, ((2, 16),))
    assert bool(unfit(engine.manifest)) == bool(rounding), "its speed says nothing of fp8"
    held = sum(layer[:, :1].nbytes for layer in engine.backend(threads=1, max_num_seqs=3)._pool.layers)
    assert held == size * kv.capacity


def test_a_saved_graph_keeps_its_cache(tmp_path: Path) -> None:
    graph = quantized(FORMS["rope"], "int4", "channel")
    graph.save(tmp_path / "g")
    again = Graph.load(tmp_path / "g")
    assert again.kv_layers() == graph.kv_layers()
    assert worst(reference(again), reference(graph)) == 0


@pytest.mark.parametrize(("cache", "digits"), [("int8", 2), ("int4", 5)])
def test_far_positions_lie_in_the_cache_as_digits(cache: str, digits: int) -> None:
    """ALiBi's channels: what a digit counts, times slope / scale in q, makes the whole position; each fits into the cache."""
    graph = quantized({"alibi": True, "kv_heads": 4}, cache, "head")
    lowered = lower(graph, capacity=9216)
    node = next(n for n in lowered.surgeon.nodes if n.op == "GroupQueryAttention")
    assert (node.attrs["k_quant_type"], node.inputs[12].shape) == ("PER_CHANNEL", (1, 4, 1, 24))
    np.testing.assert_array_equal(node.inputs[12].values[..., 16:], 1)
    q, k = (t.inputs[0].inputs[0] for t in node.inputs[:2])
    lowered.surgeon.inputs, lowered.surgeon.outputs = lowered.surgeon.inputs[:2], [q, k]
    lowered.surgeon.cleanup()
    positions = np.array([0, 1, 127, 128, 8000, 9215])
    q, k = (a.reshape(6, 4, 24) for a in run(lowered, {"input_ids": np.arange(3, 9), "position_ids": positions}))
    assert not k[..., 16 + digits :].any() and k[..., 16:].max() < {"int8": 128, "int4": 8}[cache]
    bias = np.einsum("qhc,khc->hqk", q[..., 16:], k[..., 16:]) * 0.3
    expected = 0.5 ** np.arange(1, 5).reshape(-1, 1, 1) * np.ones((4, 6, 1)) * positions
    np.testing.assert_allclose(bias, expected, rtol=1e-5)


def test_scales_that_are_none_are_refused() -> None:
    graph = form({})
    for bad in (np.zeros(2), np.full(2, np.nan), np.ones(3)):
        with pytest.raises(InputError, match=r"k_scale is .* expected positive numbers \[2\] or \[2, 16\]"):
            place_scales(graph, CACHES["int8"], [Scales(bad.astype(np.float32), np.ones(2, np.float32))])
    assert graph.kv_layers()[0].dtype == np.float32
    with pytest.raises(InputError, match="quantized already"):
        place_scales(quantized({}, "int8", "head"), CACHES["int8"], [])
