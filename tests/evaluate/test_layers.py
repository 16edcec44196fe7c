"""Layers of an ONNX Runtime engine: every serving node once, times that add up, precision, bytes and operations."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import llmlab
from llmlab.build import build
from llmlab.errors import EngineError, InputError
from llmlab.evaluate.layers.groups import join_groups
from llmlab.evaluate.layers.measure import layers, read_origins
from llmlab.evaluate.layers.model import CompiledLayer, EngineLayers
from llmlab.evaluate.layers.profile import byte_size, read_profile
from llmlab.evaluate.layers.steps import Steps
from llmlab.graph.lower.origins import Origin, Origins
from llmlab.quant.quantize import quantize
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import MANIFEST, ORIGINS, Manifest

QUICK = {"context": 5, "prompt": 6, "repeat": 3, "threads": 1}
INT4 = {"weights": {"dtype": "int4", "group": 16}}


@pytest.fixture(scope="module")
def graph(store):
    return store.serving("llama")


@pytest.fixture(scope="module")
def plain(graph, tmp_path_factory) -> Engine:
    return build(graph, tmp_path_factory.mktemp("engines") / "plain", max_seq_len=32)


@pytest.fixture(scope="module")
def seen(plain) -> EngineLayers:
    return layers(plain, **QUICK)


def uncovered(found: EngineLayers, graph, phase: str = "decode") -> set[str]:
    """Serving nodes that no layer of a phase computes and that weren't folded away; AssertionError for one that two compute."""
    named = [n for layer in found.layers if phase in layer.phases for n in layer.nodes] + list(found.folded)
    assert len(named) == len(set(named))
    return {n.name for n in graph.surgeon.nodes} - set(named)


def test_every_serving_node_is_in_one_layer(seen, graph) -> None:
    assert uncovered(seen, graph) == uncovered(seen, graph, "prefill") == set()
    short = replace(seen, layers=tuple(layer for layer in seen.layers if layer.kind != "norm"))
    assert {n.rpartition("/")[2][:16] for n in uncovered(short, graph)} == {"RMSNormalization"}, "the control"


def test_layers_are_what_they_compute(seen, graph) -> None:
    kinds = {layer.kind for layer in seen.layers}
    assert {"attention", "product", "norm", "embedding"} <= kinds
    for layer in seen.layers:
        ops = {n.rpartition("/")[2].partition("_")[0] for n in layer.nodes}
        assert ("PagedAttention" in ops) == (layer.kind == "attention")
        assert ("MatMul" in ops) == (layer.kind == "product")
        assert layer.dtype == "float32" or layer.kind == "rest"
    names = [layer.name for layer in seen.layers]
    assert len(set(names)) == len(names)


def test_times_add_up(seen) -> None:
    for phase in ("decode", "prefill"):
        total = sum(layer.seconds[phase] for layer in seen.layers)
        assert total > 0 and seen.between[phase] > 0
        assert sum(seen.by_node(phase).values()) == pytest.approx(
            sum(layer.seconds[phase] for layer in seen.layers if layer.nodes)
        )
        assert sum(seen.totals(lambda layer: layer.kind, phase).values()) == pytest.approx(total)
        assert sum(row.seconds(phase) for row in seen.rows()) == pytest.approx(total)
    attention = next(layer for layer in seen.layers if layer.kind == "attention")
    times = seen.by_node()
    assert [n for n in attention.nodes if times[n]] == [n for n in attention.nodes if "PagedAttention" in n]


def test_runs_of_a_profile_hold_their_kernels(plain, tmp_path: Path) -> None:
    """In each run kernels take no longer than the run, and most of what it takes isn't lost: the bound that is stated."""
    from llmlab.runtime.backends.onnxruntime import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend(plain.path, plain.manifest, threads=1, num_slots=1, profile=tmp_path)
    steps = Steps(5, 6, 1, 6)
    steps.run(backend.execute, 100)
    ((_, profile),) = backend.end_profiling()
    runs = read_profile(profile)
    assert len(runs) == 2 * 8
    shares = [sum(e.seconds for e in run.events) / run.seconds for run in runs]
    assert all(0 < share <= 1 for share in shares) and np.median(shares) > 0.2
    assert len({len(run.events) for run in runs}) == 1
    with pytest.raises(EngineError, match="not a profile"):
        read_profile(plain.path / MANIFEST)


def test_operations_and_bytes_are_those_of_the_model(seen, plain, graph) -> None:
    config = plain.manifest.config
    products = [layer for layer in seen.layers if layer.kind == "product"]
    inside = [layer for layer in products if "lm_head" not in layer.name]
    weights = sum(layer.weight_bytes for layer in inside) // 4
    assert sum(layer.flops["decode"] for layer in inside) == 2 * weights
    head = next(layer for layer in products if "lm_head" in layer.name)
    assert head.flops["decode"] == head.flops["prefill"] == 2 * head.weight_bytes // 4, "one row of logits each"
    attention = [layer for layer in seen.layers if layer.kind == "attention"]
    width = config.num_heads * plain.manifest.kv.layers[0][1]
    assert {layer.flops["decode"] for layer in attention} == {4 * width * 6}
    assert {layer.flops["prefill"] for layer in attention} == {4 * width * 6 * 7 // 2}
    lookup = next(layer for layer in seen.layers if layer.kind == "embedding")
    assert lookup.bytes["decode"] == 2 * 4 * config.hidden_size < lookup.weight_bytes
    assert seen.bytes("decode") > sum(layer.weight_bytes for layer in products)


def test_quantized_engines_say_in_what_they_compute(graph, tmp_path: Path) -> None:
    made = build(quantize(graph, INT4), tmp_path / "int4", max_seq_len=64, prefill="int8")
    found = layers(made, **{**QUICK, "prompt": 16})
    assert uncovered(found, graph) >= set()  # the graph that was quantized has more nodes
    by_phase = {
        p: {x.dtype for x in found.layers if x.kind == "product" and p in x.phases} for p in ("decode", "prefill")
    }
    assert "int4 × int8" in by_phase["decode"] and "int8 × int8" in by_phase["prefill"]
    assert "int8 × int8" not in by_phase["decode"]
    for phase in ("decode", "prefill"):
        named = [n for x in found.layers if phase in x.phases for n in x.nodes]
        assert len(named) == len(set(named))
        assert all(set(x.seconds) == {phase} for x in found.layers if x.phases == (phase,))


def test_layers_that_are_alike_are_one_row(seen) -> None:
    rows = seen.rows()
    assert sum(len(row.layers) for row in rows) == len(seen.layers)
    folded = next(row for row in rows if row.first.kind == "attention")
    assert "layers.0–" in folded.name and "×)" in folded.name and "–" in folded.each("decode")
    assert seen.rows(lambda layer: layer.kind == "none") == []


def test_it_is_shown_and_given_as_data(seen) -> None:
    json.dumps(seen.to_dict())
    console = Console(width=120)
    with console.capture() as captured:
        console.print(seen)
    text = captured.get()
    assert "self_attn" in text and "decode: share" in text and "computed before it runs" in text


def test_groups_of_two_steps_join() -> None:
    first = Origins(
        {"a": "A", "b": "B", "c": "C", "d": "D"},
        (Origin(("a",), ("p", "q")), Origin(("b",), ("r",)), Origin(("c",), ("s",))),
        ("d",),
    )
    second = [Origin(("q", "r"), ("k1",)), Origin(("p",), ("k2",)), Origin((), ("k3",))]
    assert join_groups(first, second) == ([(("a", "b"), ("k1", "k2")), ((), ("k3",))], ["c", "d"])


def test_bad_input(plain, tmp_path: Path) -> None:
    for name, given in (("context", 32), ("prompt", 0), ("batch", 1 << 20), ("repeat", True)):
        with pytest.raises(InputError, match=name):
            layers(plain, **{name: given})
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        layers(plain, stop=stop, **QUICK)
    old = tmp_path / "old"
    shutil.copytree(plain.path, old)
    (old / ORIGINS).unlink()
    Manifest.read(old).write(old)
    with pytest.raises(EngineError, match="build it again"):
        layers(old)
    (old / ORIGINS).write_text("[]")
    with pytest.raises(EngineError, match="altered"):
        read_origins(Engine(old, replace(plain.manifest)))


def test_small_things() -> None:
    assert byte_size(("float", (2, 3))) == 24 and byte_size(("int4", (3, 3))) == 4
    layer = CompiledLayer("model.layers.12.mlp/Gemm", "product", (), ("Gemm",), "float32")
    assert layer.alike == "model.layers.*.mlp/Gemm" and layer.block == "model.layers.12.mlp"
    assert llmlab.layers is layers
