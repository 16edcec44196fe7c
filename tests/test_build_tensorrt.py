"""`ll.build` for TensorRT-RTX, which compiles on a machine without a GPU: real plans in a whole engine folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Store

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.kernels.binaries import KernelSet
from llmlab.runtime.backends.tensorrt.open import read_program
from llmlab.runtime.backends.tensorrt.weights import find_weights
from llmlab.runtime.manifest import TENSORS
from llmlab.runtime.program import Attend, Multiply, Normalize, RunPlan
from llmlab.tensorrt.gpu import visible_gpu
from llmlab.tensorrt.layers import parse_listing

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed: pip install 'llmlab[tensorrt-rtx]'", allow_module_level=True)

CONFIG = {"max_batch": 4, "max_tokens_per_step": 32, "block_size": 16, "compute_capabilities": ((8, 9),)}


@pytest.mark.parametrize(
    ("attention", "products", "plans", "runs", "attends"),
    [("plugin", None, 1, 1, 0), ("piecewise", "tensorrt", 3, 3, 2), ("piecewise", None, 2, 2, 2)],
)
def test_an_engine_is_built_without_a_gpu(
    store: Store, tmp_path: Path, attention: str, products: Any, plans: int, runs: int, attends: int
) -> None:
    config = ll.BuildConfig(attention=attention, products=products, **CONFIG)
    engine = ll.build(
        store.serving("llama"), tmp_path / "e", target="tensorrt-rtx", config=config, kernels=KernelSet(())
    )
    manifest = ll.Engine.load(tmp_path / "e").manifest
    assert manifest == engine.manifest and manifest.compiled is not None
    assert (manifest.compiled.hosting, manifest.compiled.compute_capabilities) == (attention, ((8, 9),))
    assert (manifest.kv.layout, manifest.kv.dtype, manifest.kv.capacity) == ("paged", "float16", 16)
    assert (manifest.kv.layers, manifest.max_num_seqs) == (((2, 16), (2, 16)), 4)
    program, tables = read_program(tmp_path / "e", manifest)
    steps = [step for step in program.steps if isinstance(step, RunPlan)]
    assert len(steps) == runs and sum(isinstance(step, Attend) for step in program.steps) == attends
    by_kernels = attention == "piecewise" and products is None
    assert sum(isinstance(step, Multiply) for step in program.steps) == (9 if by_kernels else 0)
    assert sum(isinstance(step, Normalize) for step in program.steps) == (5 if by_kernels else 0)
    assert manifest.compiled.products == ("kernels" if by_kernels else "tensorrt")
    assert (TENSORS in manifest.files) == bool(program.weights) == by_kernels
    assert set(find_weights(tmp_path / "e", program, manifest)) == set(program.weights)
    files = list(dict.fromkeys(step.plan for step in steps))
    assert bool(tables) == bool(attends) and len(files) == plans and set(files) <= set(manifest.files)
    layers = json.loads((tmp_path / "e" / "layers.json").read_text())
    assert [part["plan"] for part in layers["parts"]] == files
    kinds = [layer.kind for text in layers["layers"].values() for layer in parse_listing(text).layers]
    assert kinds.count("PluginV3") == (4 if attention == "plugin" else 0), "one a layer and profile"
    assert {path.name for path in tmp_path.iterdir()} == {"e"}, "the ONNX files of the parts are gone"
    if visible_gpu() is None:
        with pytest.raises(EngineError, match="finds no NVIDIA GPU here"):
            engine.backend(max_num_seqs=4)


def test_what_can_be_compiled_but_not_run(store: Store, tmp_path: Path) -> None:
    config = ll.BuildConfig(attention="native", **CONFIG)
    with pytest.raises(InputError, match="attention='native' can be lowered and compiled, not run"):
        ll.build(store.serving("llama"), tmp_path / "e", target="tensorrt-rtx", config=config)
    with pytest.raises(InputError, match="config and kernels are for TensorRT"):
        ll.build(store.serving("llama"), tmp_path / "e", config=config)
    assert list(tmp_path.iterdir()) == []
