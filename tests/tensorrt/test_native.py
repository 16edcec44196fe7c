"""Engines whose attention is TensorRT's own, built for GPUs that aren't here: fused, and with slots updated in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

pytest.importorskip("tensorrt_rtx")

import llmlab as ll
from llmlab.graph.graph import Graph
from llmlab.graph.lower.tensorrt import lower
from llmlab.tensorrt.builder import build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.layers import Listing, parse_listing
from llmlab.tensorrt.library import resolve

PROFILES, BATCH, TOKENS, CAPACITY = 2, 8, 64, 256
DECODE = {"R": (BATCH, BATCH, BATCH), "S": (1, 1, 1)}
REST = {"R": (1, BATCH, BATCH), "S": (1, TOKENS, TOKENS)}


def lowered(graph: Graph) -> Any:
    (part,) = lower(graph, hosting="native", block_size=CAPACITY).parts
    return part.graph  # type: ignore[union-attr]


def build(graph: Graph, gpu: tuple[int, int], folder: Path) -> Listing:
    """What is in an engine of two profiles: decodes of BATCH sequences, and any other step."""
    config = BuildConfig(
        max_batch=BATCH,
        max_tokens_per_step=TOKENS,
        decode_buckets=(BATCH,),
        attention="native",
        compute_capabilities=(gpu,),
    )
    shapes = {t.name: t.shape for t in graph.surgeon.inputs}
    profiles = [config.profiles(shapes, DECODE)[0], config.profiles(shapes, REST)[-1]]
    (folder / "model.onnx").write_bytes(graph.to_onnx().SerializeToString())
    return parse_listing(build_plan(resolve("tensorrt-rtx"), folder / "model.onnx", profiles, config).listing)


def check_fused(listing: Listing, layers: int) -> None:
    """One kernel for each layer's scores, softmax and sums: of the kind for one query where steps are decodes."""
    for kind in ("gemv_mha", "gemm_mha"):
        assert sum(kind in x.name for x in listing.layers) == layers, f"attention is not one {kind}"


def check_in_place(listing: Listing, layers: int) -> None:
    """Nothing reads what a slot held under another name than the one that it is written to."""
    read = {v.name.partition(" [")[0] for x in listing.layers for v in x.inputs}
    assert not [name for name in read if name.startswith("past_")], "slots are copied"
    assert {f"present_{what}.{i}" for what in ("key", "value") for i in range(layers)} <= read


QUICK = [("tinychat", "float16", (8, 9), 6)]
MORE = [
    (name, precision, gpu, 2)
    for name in ("llama3", "qwen2", "qwen3", "mistral")
    for precision in ("float16", "bfloat16")
    for gpu in ((8, 0), (8, 9), (12, 0))
]


@pytest.mark.parametrize(
    ("model", "precision", "gpu", "layers"), [*QUICK, *(pytest.param(*given, marks=pytest.mark.slow) for given in MORE)]
)
def test_attention_is_fused_and_slots_are_updated_in_place(
    store: Any, tmp_path: Path, model: str, precision: str, gpu: tuple[int, int], layers: int
) -> None:
    listing = build(lowered(ll.convert(store.serving(model), precision)), gpu, tmp_path)
    check_fused(listing, layers)
    check_in_place(listing, layers)
    profiles = {b.name: b.profiles for b in listing.bindings}
    assert profiles["unpack_index"] == (((BATCH, 1),) * 3, ((1, 1), (BATCH, TOKENS), (BATCH, TOKENS)))


def test_checks_see_attention_that_is_missing_and_slots_that_are_copied(store: Any, tmp_path: Path) -> None:
    graph = lowered(ll.convert(store.serving("llama"), "float16"))
    attention = next(n for n in graph.surgeon.nodes if n.op == "Attention")
    attention.op, attention.inputs, attention.attrs = "Identity", attention.inputs[:1], {}
    update = next(n for n in graph.surgeon.nodes if n.op == "TensorScatter")
    one = gs.Constant("one", np.ones(1, np.float16))
    update.op, update.inputs, update.attrs = "Add", [update.inputs[0], one], {}
    listing = build(graph, (8, 9), tmp_path)
    with pytest.raises(AssertionError, match="attention is not one gemv_mha"):
        check_fused(listing, 2)
    with pytest.raises(AssertionError, match="slots are copied"):
        check_in_place(listing, 2)
