"""Engines with the PagedAttention plugin, built for GPUs that aren't here, and what has to be true of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quantised import RECIPES, Expected, quantise

import llmlab as ll
from llmlab.graph.graph import Graph
from llmlab.graph.lower.tensorrt import lower
from llmlab.tensorrt.builder import build_plan
from llmlab.tensorrt.config import BuildConfig
from llmlab.tensorrt.layers import Layer, Listing, Value, parse_listing
from llmlab.tensorrt.library import resolve

PRECISIONS = ("float16", "bfloat16", *RECIPES)
GPUS = ((8, 0), (8, 9), (12, 0))
PROFILES, BATCH, TOKENS, BLOCKS, TABLE = 2, 8, 64, (1, 64, 4096), (1, 4, 16)
LISTED = {"float16": "Half", "bfloat16": "BFloat16"}


@dataclass(frozen=True)
class Built:
    listing: Listing
    layers: int
    """Attention layers of the model."""
    quantised: int
    """Weights (numbers) that Q/DQ was put on."""


def lowered(graph: Graph, precision: str) -> tuple[Graph, int]:
    """The graph that TensorRT gets, and how many weights in it are quantised."""
    half, count = ll.convert(graph, precision if precision == "bfloat16" else "float16"), 0
    if precision in RECIPES:
        half, count = quantise(half, RECIPES[precision].recipe)
    (part,) = lower(half, hosting="plugin", block_size=64).parts
    work: Any = part.graph  # type: ignore[union-attr]
    return work, count


def build(graph: Graph, precision: str, gpu: tuple[int, int], folder: Path) -> Built:
    work, count = lowered(graph, precision)
    return Built(compile_graph(work, gpu, folder), _attention(work), count)


def compile_graph(graph: Graph, gpu: tuple[int, int], folder: Path) -> Listing:
    config = BuildConfig(
        max_batch=BATCH, max_tokens_per_step=TOKENS, decode_buckets=(BATCH,), compute_capabilities=(gpu,)
    )
    (folder / "model.onnx").write_bytes(graph.to_onnx().SerializeToString())
    shapes = {t.name: t.shape for t in graph.surgeon.inputs}
    sizes = {"blocks": BLOCKS, "max_blocks": TABLE, "B+1": (2, BATCH + 1, BATCH + 1)}
    plan = build_plan(
        resolve("tensorrt-rtx"), folder / "model.onnx", config.profiles(shapes, sizes), config, plugin=True
    )
    return parse_listing(plan.listing)


def _attention(graph: Graph) -> int:
    return sum(n.op == "PagedAttention" for n in graph.surgeon.nodes)


def check_engine(built: Built, precision: str) -> None:
    """One plugin a layer and profile, in place; two profiles; products in the precision, with nothing left in front of them."""
    check_profiles(built.listing)
    check_plugins(built.listing, built.layers)
    check_products(built.listing, precision, built.quantised)


def check_profiles(listing: Listing) -> None:
    """A decode step has as many tokens as sequences; any other step up to TOKENS of them. Both see the whole pool."""
    found = {b.name: b.profiles for b in listing.bindings if b.is_input}
    decode, rest = (BATCH,), (TOKENS,)
    assert found["input_ids"] == found["slots"] == ((decode,) * 3, ((1,), rest, rest))
    assert found["kv_len"] == ((decode,) * 3, ((1,), decode, decode))
    assert [[shape[1] for shape in profile] for profile in found["kv_cache.0"]] == [list(BLOCKS)] * 2


def check_plugins(listing: Listing, count: int) -> None:
    """A plugin in place stays a layer of its own, from the engine's own input to its own output."""
    plugins = [x for x in listing.layers if "PagedAttention" in x.name]
    assert [x.kind for x in plugins] == ["PluginV3"] * (count * PROFILES), "a layer without its plugin"
    pools = [[_plain(v) for v in (*x.inputs, *x.outputs) if v.name.startswith("kv_cache.")] for x in plugins]
    assert sorted(pools) == sorted(
        [f"kv_cache.{i}", f"kv_cache.{i}.updated"] for i in range(count) for _ in range(PROFILES)
    )
    others = [x for x in listing.layers if x not in plugins]
    assert not [x.name for x in others for v in (*x.inputs, *x.outputs) if "kv_cache." in v.name], "a pool is copied"


def check_products(listing: Listing, precision: str, quantised: int) -> None:
    """Products of `quantised` weights read them, and int8 and fp8 activations, as they are."""
    products = [x for x in listing.layers if x.weight is not None]
    assert products
    if precision not in RECIPES:
        assert {x.weight.dtype for x in products if x.weight} <= {LISTED[precision], "Float"}  # routers are wide
        return
    recipe = RECIPES[precision]
    narrow = [x for x in products if x.weight and x.weight.dtype == recipe.listed]
    read = sum(int(np.prod(x.weight.shape)) for x in narrow if x.weight)
    assert read == quantised * PROFILES, "products left in half precision"
    if recipe.activations:
        assert {x.inputs[0].dtype for x in narrow} == {recipe.listed}, "activations widened in front of a product"
    apart = [x.name for x in listing.layers if x not in narrow and _widens(x, recipe)]
    assert not apart, "weights widened by a layer of their own"


def _widens(layer: Layer, recipe: Expected) -> bool:
    """Whether a layer reads a quantised matrix and gives it in another type. (To look rows of one up is no harm.)"""
    shapes = [v.shape for v in layer.outputs if v.dtype != recipe.listed]
    matrices = (v.shape for v in layer.constants if v.dtype == recipe.listed and len(v.shape) == 2)
    return any(shape in shapes or shape[::-1] in shapes for shape in matrices)


def _plain(value: Value) -> str:
    return value.name.partition(" [profile")[0]
