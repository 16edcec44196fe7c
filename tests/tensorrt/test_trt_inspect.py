"""What an engine says about itself, by the build's listing and by the inspector, and the times of its layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trt_graphs

from llmlab.errors import EngineError
from llmlab.tensorrt.builder import build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.inspect import LayerTimes, computes_in, inspect_plan, listing_of, summary, summary_of
from llmlab.tensorrt.layers import Binding, Layer, Listing, Value, parse_listing
from llmlab.tensorrt.library import Library, resolve

CONFIG = BuildConfig(max_batch=8, max_tokens_per_step=32, decode_buckets=(1,), compute_capabilities=((8, 9),))


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("polygraphy")
    return resolve("tensorrt-rtx")


@pytest.fixture(scope="module")
def listing(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Listing:
    path = trt_graphs.mlp(tmp_path_factory.mktemp("mlp") / "mlp.onnx")
    return parse_listing(build_plan(library, path, CONFIG.profiles({"x": ("T", 64)}), CONFIG).listing)


def test_layers_name_the_nodes_that_they_compute(listing: Listing) -> None:
    nodes = {"n_wide", "n_norm", "n_half", "gate", "up", "sigmoid", "silu", "product", "down", "residual"}
    assert {node for layer in listing.layers for node in layer.nodes} == nodes
    products = [layer for layer in listing.layers if "down" in layer.nodes]
    assert products and all(computes_in(layer) == "Half" for layer in products)
    norm = next(layer for layer in listing.layers if layer.nodes == ("n_wide", "n_norm"))
    assert computes_in(norm) == "Float", "the norm's sum stays wide"


def test_a_summary_in_json_types(listing: Listing) -> None:
    found = summary(listing)
    assert found.layers == sum(found.kinds.values()) and set(found.types) == {"Half", "Float"}
    assert found.profiles == ({"x": ((1, 64),) * 3}, {"x": ((1, 64), (32, 64), (32, 64))})
    assert found.plugins == () and found.in_place == {}
    assert json.loads(json.dumps(vars(found)))["kinds"] == found.kinds


POOL, ROWS = (2, -1, 2, 16, 8), (-1, 64)


@pytest.mark.parametrize(("copied", "in_place"), [(False, {"kv_cache.0.updated": "kv_cache.0"}), (True, {})])
def test_the_plugin_and_what_it_updates_in_place(copied: bool, in_place: dict[str, str]) -> None:
    """`copied`: a layer stands between the plugin and the engine's input, so that it is another memory."""
    pool = Value("a copy" if copied else "kv_cache.0 [profile 1]", POOL, "Half")
    outputs = (Value("out", ROWS, "Half"), Value("kv_cache.0.updated [profile 1]", POOL, "Half"))
    plugin = Layer("attn [profile 1]", "PluginV3", (Value("qkv", ROWS, "Half"), pool), (), outputs)
    bindings = (Binding("kv_cache.0", True, "Half", POOL, ()), Binding("kv_cache.0.updated", False, "Half", POOL, ()))
    found = summary(Listing((plugin,), bindings))
    assert found.plugins == ("attn [profile 1]",) and found.in_place == in_place


class Engine:
    """An open engine of TensorRT 8.6, as its inspector describes it."""

    num_io_tensors, num_optimization_profiles = 2, 2

    def __init__(self, layers: Any) -> None:
        self._text = layers if isinstance(layers, str) else json.dumps({"Layers": layers, "Bindings": ["x", "y"]})

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: self._text)

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="HALF")

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1, 64]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert name == "x", "only inputs have one"
        return [[1, 64], [1, 64], [1, 64]] if profile == 0 else [[1, 64], [32, 64], [32, 64]]


MODULE = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), LayerInformationFormat=SimpleNamespace(JSON=1)
)
OLD = Library("tensorrt", MODULE, (8, 6, 1), None, None)  # type: ignore[arg-type]


def test_the_inspector_of_8_6_gives_the_same_form() -> None:
    x = {"Name": "x", "Dimensions": [-1, 64], "Format/Datatype": "Row major linear FP16 format"}
    y = {"Name": "y", "Dimensions": [-1, 64], "Format/Datatype": "Row major linear FP32"}
    engine = Engine(
        [
            {"Name": "gate", "LayerType": "gemm", "Inputs": [x], "Outputs": [y], "Metadata": "[ONNX Layer: gate]"},
            "a name alone",
        ]
    )
    gate, other = listing_of(OLD, engine).layers
    assert (gate.inputs[0].dtype, gate.outputs[0].dtype, gate.nodes, computes_in(gate)) == (
        "Half",
        "Float",
        ("gate",),
        "Float",
    )
    assert other == Layer("a name alone", "", (), (), ())
    assert summary(listing_of(OLD, engine)).profiles == ({"x": ((1, 64),) * 3}, {"x": ((1, 64), (32, 64), (32, 64))})
    assert [b.dtype for b in listing_of(OLD, engine).bindings] == ["Half", "Half"]


def test_an_open_engine_knows_itself_what_it_writes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine([{"Name": "gate", "LayerType": "gemm"}])
    assert summary_of(OLD, engine).in_place == {} and summary_of(OLD, engine).kinds == {"gemm": 1}
    monkeypatch.setattr(
        Engine, "get_aliased_input_tensor", lambda self, name: "x" if name == "y" else None, raising=False
    )
    assert summary_of(OLD, engine).in_place == {"y": "x"}


def test_the_inspectors_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Library, "load", lambda self, plan, where: Engine([{"Name": plan.decode(), "LayerType": where}])
    )
    layers = [{"Name": "a plan", "LayerType": "a.plan"}]
    assert inspect_plan(OLD, b"a plan", "a.plan") == {"Layers": layers, "Bindings": ["x", "y"]}


@pytest.mark.parametrize(("text", "said"), [("{", "gave no JSON"), ("[]", "gave list, expected a mapping")])
def test_an_inspector_that_says_nothing(text: str, said: str) -> None:
    with pytest.raises(EngineError, match=f"the inspector of TensorRT 8.6.1 {said}"):
        listing_of(OLD, Engine(text))


def test_the_times_of_layers(library: Library, tmp_path: Path) -> None:
    times = LayerTimes(library)
    context = SimpleNamespace(profiler=None)
    with times.watch(context):
        for name, ms in (("norm", 0.5), ("gemm", 2.0), ("norm", 1.5), ("gemm", 4.0)):
            context.profiler.report_layer_time(name, ms)
    assert times.rows() == [("gemm", 3.0, 2), ("norm", 1.0, 2)] and context.profiler is None
