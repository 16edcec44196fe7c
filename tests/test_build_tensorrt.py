"""`ll.build` for TensorRT-RTX, which compiles on a machine without a GPU: real plans in a whole engine folder."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Store

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.evaluate.layers.tensorrt_steps import nodes_of, profiles_of
from llmlab.kernels.binaries import KernelSet
from llmlab.runtime.backends.tensorrt.open import read_program
from llmlab.runtime.backends.tensorrt.weights import find_weights
from llmlab.runtime.manifest import TENSORS
from llmlab.runtime.program import Attend, Multiply, Normalize, RunPlan
from llmlab.tensorrt.gpu import visible_gpu
from llmlab.tensorrt.layers import Layer, Value, parse_listing
from llmlab.widgets.engine_view.panel import view_engines

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
    check_layers(engine, ll.convert(store.serving("llama"), "float16"), attention, by_kernels)


def check_layers(engine: ll.Engine, graph: ll.Graph, attention: str, by_kernels: bool) -> None:
    """In each phase every node of the serving graph is in one layer, or said to be folded away; precisions and kernels are named."""
    found = ll.layers(engine)
    for phase in ("decode", "prefill"):
        mine = [layer for layer in found.layers if phase in layer.phases]
        named = [n for layer in mine for n in layer.nodes] + list(found.folded)
        assert sorted(named) == sorted(n.name for n in graph.surgeon.nodes)
        kinds = Counter(layer.kind for layer in mine)
        assert kinds["attention"] == 2 and kinds["product"] in (8, 9)
        assert {layer.dtype for layer in mine if layer.kind == "product"} == {"float16"}
        assert sum(layer.flops[phase] for layer in mine if layer.kind == "product") > 0
    runs = {kernel for layer in found.layers for kernel in layer.kernels}
    assert ("product kernel + residual" in runs) == by_kernels
    assert ("attention plugin" in runs) == (attention == "plugin")
    if visible_gpu() is None:
        assert found.phases == () and "times are not measured here" in found.notes[0]
        assert found.by_node() == {} and "ev-bar" not in view_engines(found).html()


def test_layers_of_a_listing_belong_to_a_profile() -> None:
    """TensorRT names the profile only where a layer touches a binding; what was fused in one go is of one profile."""

    def layer(name: str, *tensors: str) -> Layer:
        return Layer(name, "kgen", tuple(Value(t, (1,), "Half") for t in tensors), (), ())

    given = [
        layer("a_myl3_0", "x"),
        layer("b_myl3_1", "t"),
        layer("constant"),
        layer("c_myl7_0", "t2"),
        layer("d_myl7_1", "y [profile 1]"),
        layer("plugin [profile 1]"),
        layer("constant 2"),
    ]
    assert profiles_of(given) == [0, 0, 0, 1, 1, 1, 1]


def test_layers_of_an_old_tensorrt_say_by_name_what_they_compute() -> None:
    known = ["m/MatMul", "m/Add", "m/Mul", "m/MatMul_1"]
    for name, nodes in (
        ("m/MatMul + m/Add", ["m/MatMul", "m/Add"]),
        ("{ForeignNode[m/Add...m/MatMul_1]}", ["m/Add", "m/Mul", "m/MatMul_1"]),
        ("{ForeignNode[other...m/Mul]}", ["m/Mul"]),
        ("Reformatting CopyNode for x", []),
    ):
        assert nodes_of(Layer(name, "", (), (), ()), known) == nodes


def test_what_can_be_compiled_but_not_run(store: Store, tmp_path: Path) -> None:
    config = ll.BuildConfig(attention="native", **CONFIG)
    with pytest.raises(InputError, match="attention='native' can be lowered and compiled, not run"):
        ll.build(store.serving("llama"), tmp_path / "e", target="tensorrt-rtx", config=config)
    with pytest.raises(InputError, match="config and kernels are for TensorRT"):
        ll.build(store.serving("llama"), tmp_path / "e", config=config)
    assert list(tmp_path.iterdir()) == []
