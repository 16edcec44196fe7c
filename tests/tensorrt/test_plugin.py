"""The PagedAttention plugin: found by the parser, in place, its attributes in the engine, its errors reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attention_forms import quantized
from onnx import TensorProto, helper
from plugin_engines import check_plugins, compile_graph

import llmlab as ll
from llmlab.errors import EngineError
from llmlab.graph.lower.tensorrt import lower
from llmlab.tensorrt.attention_node import AttentionNode
from llmlab.tensorrt.builder import build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.layers import Listing, parse_listing
from llmlab.tensorrt.library import resolve
from llmlab.tensorrt.plugin import NAME, plugin_fields, plugin_host

pytest.importorskip("tensorrt_rtx")

LIBRARY = resolve("tensorrt-rtx")
trt = LIBRARY.module
CONFIG = BuildConfig(max_batch=4, max_tokens_per_step=8, decode_buckets=(), compute_capabilities=((8, 9),))
Build = Callable[..., tuple[bytes, Listing]]

NODE = AttentionNode(num_heads=4, kv_num_heads=2, head_dim=32, block_size=16, scale=0.25, rotary=16, packed=1)
POOL: list[int | str] = [2, "blocks", 2, 16, 32]
F16, BF16, F32 = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT
INT8, FP8, I32, I64 = TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT32, TensorProto.INT64


def one_node(node: AttentionNode, *, rows: int = F16, **other: Any) -> onnx.ModelProto:
    """A model of one PagedAttention; `other` replaces the type or shape of an input, or an attribute."""
    kv, dim = node.kv_num_heads, node.head_dim
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "qkv": (rows, ["T", (node.num_heads + 2 * kv) * dim]),
        "q": (rows, ["T", node.width]),
        "k": (rows, ["T", kv * dim]),
        "v": (rows, ["T", kv * dim]),
        "pool": (rows, [2, "blocks", kv, node.block_size, dim]),
        "query_start": (I32, ["B1"]),
        "kv_len": (I32, ["B"]),
        "block_table": (I32, ["B", "max_blocks"]),
        "position_ids": (I32, ["T"]),
        "slots": (I64, ["T"]),
        "cos": (F32, [64, node.rotary // 2]),
        "sin": (F32, [64, node.rotary // 2]),
        **{name: (F32, [node.num_heads]) for name in ("alibi_slopes", "sinks")},
        **{name: (F32, [kv]) for name in ("k_scale", "v_scale")},
    }
    shapes |= {name: value for name, value in other.items() if name in shapes and isinstance(value, tuple)}
    attributes = {**asdict(node), **{name: value for name, value in other.items() if name not in shapes}}
    made = helper.make_node(
        NAME, list(node.inputs), ["out", "pool.updated"], name="attn", domain="llmlab", **attributes
    )
    inputs = [helper.make_tensor_value_info(name, *shapes[name]) for name in node.inputs]
    outputs = [
        helper.make_tensor_value_info("out", rows, ["T", node.width]),
        helper.make_tensor_value_info("pool.updated", *shapes["pool"]),
    ]
    graph = helper.make_graph([made], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("llmlab", 1)]
    return helper.make_model(graph, ir_version=11, opset_imports=opsets)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """The plan for SM89 and what is in it."""

    def run(model: onnx.ModelProto, *, plugin: bool = True) -> tuple[bytes, Listing]:
        onnx.save(model, tmp_path / "model.onnx")
        shapes = {t.name: [d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in model.graph.input}
        profiles = CONFIG.profiles(shapes, {"blocks": (1, 8, 64), "max_blocks": (1, 4, 4)})
        plugin_host(trt)
        plan = build_plan(LIBRARY, tmp_path / "model.onnx", profiles, CONFIG, plugin=plugin)
        return bytes(plan.data), parse_listing(plan.listing)

    return run


VARIANTS = {
    "packed": {},
    "bfloat16": {"rows": BF16},
    "apart": {"packed": 0},
    "everything": {"packed": 0, "alibi": 1, "sinks": 1, "window": 6, "softcap": 2.0, "rotary": 0},
    "int8": {"quantized": 1, "pool": (INT8, POOL)},
    "fp8": {"quantized": 1, "pool": (FP8, POOL), "rows": BF16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_layer_is_built_in_place(build: Build, variant: str) -> None:
    given = dict(VARIANTS[variant])
    types = {name: given.pop(name) for name in ("rows", "pool") if name in given}
    node = AttentionNode(**{**asdict(NODE), **given})
    _, listing = build(one_node(node, **types))
    (layer,) = (x for x in listing.layers if x.kind == "PluginV3")
    assert layer.name == "attn"
    assert len(layer.inputs) == len(node.inputs)
    # Only a layer whose output lies in its input's memory stays apart from TensorRT's own kernels.
    assert [v.name for v in layer.outputs] == ["out", "pool.updated"]
    assert layer.inputs[node.pool].name == "pool"


def test_without_the_preview_feature_nothing_is_in_place(build: Build) -> None:
    with pytest.raises(EngineError, match="Aliased I/O used by plugin attn"):
        build(one_node(NODE), plugin=False)


def test_a_pool_that_is_not_in_place_shows_in_the_listing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(made()), "get_aliased_input", lambda self, output: -1)
    _, listing = build(one_node(NODE))
    assert [x.kind for x in listing.layers if x.name.startswith("attn")] == ["custom_layer"]


def made(node: AttentionNode = NODE) -> Any:
    """The plugin as the parser makes it."""
    given, _kept = plugin_fields(trt, asdict(node))
    return plugin_host(trt).creator.create_plugin("x", given, trt.TensorRTPhase.BUILD)


def test_what_is_in_the_engine_is_what_the_node_said(build: Build) -> None:
    node = AttentionNode(8, 2, 80, 64, 0.11, window=7, softcap=30.0, interleaved=1, rotary=40, alibi=1, sinks=1)
    plugin = made(node)
    fields = {f.name: float(np.asarray(f.data).reshape(-1)[0]) for f in plugin.get_fields_to_serialize()}
    again = AttentionNode.from_attributes(fields)
    assert again == AttentionNode(**{**asdict(node), "scale": float(np.float32(0.11))})
    plan, _ = build(one_node(node))
    for name in ("num_heads", "kv_num_heads", "softcap", "rotary", "quantized"):
        assert name.encode() in plan


WRONG = {
    "a pool of another type": ({"pool": (F32, POOL)}, "pool is float32 where its rows are float16"),
    "int64 indices": ({"kv_len": (I64, ["B"])}, "kv_len is int64"),
    "float32 rows": ({"rows": F32}, "qkv is float32"),
    "rows too narrow": ({"qkv": (F16, ["T", 100])}, r"qkv is \[-1, 100\], expected \[-1, 256\]"),
    "blocks of another size": ({"pool": (F16, [2, "blocks", 2, 8, 32])}, r"pool is \[2, -1, 2, 8, 32\]"),
    "a table of another width": ({"cos": (F32, [64, 9])}, r"cos is \[64, 9\], expected \[-1, 8\]"),
    "heads that don't divide": ({"kv_num_heads": 3}, "attributes that no model has"),
    "no head size": ({"head_dim": 0}, "attributes that no model has"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_line(build: Build, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    given, message = WRONG[what]
    with pytest.raises(EngineError, match=message) as found:
        build(one_node(NODE, **given))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "callback",
    [
        "get_output_data_types",
        "get_output_shapes",
        "supports_format_combination",
        "configure_plugin",
        "get_workspace_size",
    ],
)
def test_an_exception_in_a_callback_is_an_error_of_the_build(
    build: Build, callback: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object, *arguments: object) -> None:
        raise ValueError(f"{callback} is broken")

    monkeypatch.setattr(type(made()), callback, plugin_host(trt).recorded(broken))
    with pytest.raises(EngineError, match=f"the PagedAttention plugin failed: ValueError: {callback} is broken"):
        build(one_node(NODE))
    monkeypatch.undo()
    build(one_node(NODE))  # nothing of it is left


def test_ctrl_c_in_a_callback_stays_one(
    build: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: object, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(made()), "configure_plugin", plugin_host(trt).recorded(stopped))
    with pytest.raises(KeyboardInterrupt):
        build(one_node(NODE))


def test_an_engine_is_not_opened_without_its_kernels() -> None:
    given, _kept = plugin_fields(trt, asdict(NODE))
    with (
        pytest.raises(EngineError, match=r"needs its kernels: open it through llmlab\.LLM"),
        plugin_host(trt).reporting(),
    ):
        plugin_host(trt).creator.create_plugin("x", given, trt.TensorRTPhase.RUNTIME)


def test_a_node_without_an_attribute_is_refused(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    model = one_node(NODE)
    kept = [a for a in model.graph.node[0].attribute if a.name != "block_size"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(EngineError, match="PagedAttention lacks block_size"):
        build(model)


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_a_graph_with_a_quantized_cache_builds(tmp_path: Path, cache: str) -> None:
    """The pool goes in and comes back in its own type, in place, with no layer around the plugin that converts it."""
    graph = ll.convert(quantized({"rotary": 16, "dim": 32}, cache, "head"), "float16")
    (part,) = lower(graph, hosting="plugin", block_size=64).parts
    listing = compile_graph(part.graph, (8, 9), tmp_path)  # type: ignore[union-attr]
    check_plugins(listing, 1)
    assert {b.dtype for b in listing.bindings if b.name.startswith("kv_cache.0")} == {
        "Int8" if cache == "int8" else "FP8"
    }
