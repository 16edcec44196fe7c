"""What is lowered for TensorRT is what TensorRT reads: every hosting of a real model is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Store

import llmlab as ll
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Dense
from llmlab.graph.store.storage import write_onnx
from llmlab.tensorrt.builder import PlanBuilder
from llmlab.tensorrt.library import resolve

pytest.importorskip("tensorrt_rtx")

SIZES = {"blocks": (1, 64, 512), "max_blocks": (1, 4, 8), "R": (1, 4, 4), "S": (1, 4, 8)}


@pytest.mark.parametrize(("hosting", "dialect"), [("piecewise", 17), ("piecewise", 23), ("plugin", 23), ("native", 23)])
def test_every_hosting_is_compiled(store: Store, tmp_path: Path, hosting: str, dialect: int) -> None:
    graph = ll.convert(store.serving("llama"), "float16")
    block_size = {"plugin": 16, "native": 72}.get(hosting)
    lowered = lower(graph, hosting=hosting, dialect=dialect, block_size=block_size)
    parts = [part for part in lowered.parts if isinstance(part, Dense)]
    config = ll.BuildConfig(max_batch=4, max_tokens_per_step=16, compute_capabilities=("8.9",))
    with PlanBuilder(resolve("tensorrt-rtx"), config, total=len(parts)) as builder:
        for i, part in enumerate(parts):
            write_onnx(part.graph.surgeon, tmp_path, f"{i}.onnx", f"{i}.bin")
            inputs = part.graph.surgeon.inputs
            shapes = {t.name: tuple("B1" if d == "B+1" else d for d in t.shape) for t in inputs}
            profiles = config.profiles(shapes, sizes=SIZES)
            plan = builder.build(tmp_path / f"{i}.onnx", profiles, name=part.name, plugin=hosting == "plugin")
            assert all(name in plan.listing for name in (*part.inputs, *part.outputs))
