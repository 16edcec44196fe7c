"""`build`: sizes, targets, and what ends up in the engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Store

from llmlab.build import build
from llmlab.errors import CheckpointError, InputError
from llmlab.graph.lower.onnxruntime import LOWERED_INPUTS
from llmlab.graph.store import storage
from llmlab.runtime.engine import Engine


def test_sizes_default_to_the_model(store: Store, tmp_path: Path) -> None:
    engine = build(store.serving("llama"), tmp_path / "e")
    limits = engine.manifest.limits
    assert (limits.max_seq_len, limits.max_tokens_per_step) == (64, 256)
    assert engine.manifest.kv.capacity >= limits.max_seq_len + limits.max_tokens_per_step
    assert engine.manifest == Engine.load(tmp_path / "e").manifest


@pytest.mark.parametrize(("seq", "step"), [(1, 1), (64, 1), (33, 1 << 16)])
def test_sizes_that_are_asked_for(store: Store, tmp_path: Path, seq: int, step: int) -> None:
    manifest = build(store.serving("llama"), tmp_path / "e", max_seq_len=seq, max_tokens_per_step=step).manifest
    assert (manifest.limits.max_seq_len, manifest.limits.max_tokens_per_step) == (seq, step)
    assert manifest.kv.capacity >= seq + step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len is 0, expected an integer from 1 to 64"),
        ({"max_seq_len": 65}, "max_seq_len is 65, expected an integer from 1 to 64"),
        ({"max_seq_len": True}, "max_seq_len is True, expected an integer from 1 to 64"),
        ({"max_seq_len": "64"}, "max_seq_len is '64', expected an integer from 1 to 64"),
        ({"max_tokens_per_step": -1}, "max_tokens_per_step is -1, expected an integer from 1 to 65536"),
        ({"max_tokens_per_step": 1.5}, "max_tokens_per_step is 1.5, expected an integer from 1 to 65536"),
        ({"target": "cuda"}, "target is 'cuda'; available: onnxruntime, tensorrt, tensorrt-rtx"),
    ],
)
def test_sizes_and_targets_that_are_none(store: Store, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build(store.serving("llama"), tmp_path / "e", **options)
    assert str(caught.value) == message and list(tmp_path.iterdir()) == []


def test_what_is_no_serving_graph(store: Store, tmp_path: Path) -> None:
    for graph in (store.plain("llama"), None, "graphs/serving"):
        with pytest.raises(InputError, match=r"expected a serving graph: pass what llmlab.optimize returned"):
            build(graph, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_generation_config_stops_it(store: Store, tmp_path: Path) -> None:
    graph = store.serving("llama").copy()
    graph.assets = {"generation_config.json": b"{"}
    with pytest.raises(CheckpointError, match=r"generation_config.json: not valid JSON"):
        build(graph, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_the_graph_is_not_changed(store: Store, tmp_path: Path) -> None:
    graph = store.serving("qwen2")
    before = (graph.op_counts(), [t.name for t in graph.surgeon.inputs], len(graph.history))
    build(graph, tmp_path / "e")
    assert (graph.op_counts(), [t.name for t in graph.surgeon.inputs], len(graph.history)) == before


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2"])
def test_the_lowered_model(store: Store, name: str) -> None:
    path = store.engine(name)
    model = onnx.load(path / "model.onnx", load_external_data=False)
    inputs = [i.name for i in model.graph.input]
    caches = [n for n in inputs if n not in LOWERED_INPUTS]
    assert caches == [f"past_{what}.{i}" for i in range(2) for what in ("key", "value")]
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    assert counts["GroupQueryAttention"] == 2
    assert not {"PagedAttention", "MatMul", "Transpose", "Cast"} & set(counts), (
        "every product reads its weight as stored"
    )
    weights = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) == 2}
    tables = sum(n for t, n in weights.items() if "embed" in t or "lm_head" in t)
    assert tables == 96 * 64 * (1 if name in ("llama3", "qwen2") else 2), "a tied embedding is stored once"


def test_weights_are_stored_once(store: Store) -> None:
    engine = Engine.load(store.engine("llama"))
    parameters = sum(p.numel() for p in store.model("llama").parameters()) * 4
    rope = 2 * engine.manifest.kv.capacity * 8 * 4
    weights = int(engine.manifest.files["weights.bin"]["size"])
    assert parameters < weights + 64 * 1024 and weights < parameters + rope + 4096 * 64


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_building_that_is_interrupted_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """In the middle of the weights, and the graph is as it was."""
    graph, written = store.serving("llama"), iter(range(5))
    load = storage.loaded

    def interrupted(values: Any) -> np.ndarray:
        if next(written, None) is None:
            raise stop
        return load(values)

    monkeypatch.setattr(storage, "loaded", interrupted)
    with pytest.raises(stop):
        build(graph, tmp_path / "e")
    assert list(tmp_path.iterdir()) == [] and graph.weight_bytes == store.serving("llama").weight_bytes
