"""Quantized graphs lowered for TensorRT: the numbers are those of the serving graph, and what it lacks is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Store
from lowered import Execution
from static_scales import ANYTHING, static_scale
from steps import Plan, all_rows, batches, feeds, paged_tables, worst_error

import llmlab as ll
from llmlab.errors import UnsupportedModelError
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Dense
from llmlab.graph.store.storage import array, constants

PLAN = Plan(((7, 1, 1), (1, 4, 1), (0, 5, 1)))
BLOCK, BLOCKS = 4, 12
EXACT, ROUNDED = 1e-5, 2e-2
STATIC = {"int8_w8a8": ROUNDED, "fp8": ROUNDED, "int4_rtn_g16": EXACT, "int8": EXACT, "fp8_weights_tensor": EXACT}
MIXED = {"base": "int8_w8a8", "layers": {"*.v_proj": None, "down": "int4_rtn_g16"}}


def quantized(graph: Graph, recipe: Any) -> Graph:
    with static_scale(0.04):
        return ll.quantize(graph, recipe, calibration=ANYTHING)


def logits(run: Any) -> np.ndarray:
    steps = batches(PLAN, 96, paged_tables(PLAN, BLOCK, BLOCKS), all_rows)
    return np.concatenate([run.step(feeds(batch)) for batch, _ in steps]).astype(np.float32)


@pytest.mark.parametrize("recipe", [*STATIC, MIXED], ids=str)
def test_the_numbers_stay(store: Store, recipe: Any) -> None:
    """Lowered, one DequantizeLinear for a merged product; and converted after it was quantized."""
    graph = quantized(store.serving("llama"), recipe)
    expected = logits(Interpreter(graph, BLOCKS, BLOCK))
    found = lower(graph)
    run = Execution(found, BLOCKS, BLOCK, "reference")
    assert worst_error(logits(run), expected) < (STATIC[recipe] if isinstance(recipe, str) else ROUNDED)
    wide = logits(Interpreter(store.serving("llama"), BLOCKS, BLOCK))
    assert worst_error(wide, expected) > 0.02, "the recipe makes a difference"
    products = [n for p in found.parts if isinstance(p, Dense) for n in p.graph.surgeon.nodes if n.op == "MatMul"]
    makers = [n.inputs[1].inputs[0].op for n in products if n.inputs[1].inputs]
    assert makers.count("DequantizeLinear") == (8 if isinstance(recipe, str) else makers.count("DequantizeLinear"))
    assert "Transpose" not in makers


@pytest.mark.parametrize("recipe", ["int8_w8a8", "int4_rtn_g16", "fp8_weights"])
def test_converting_before_or_after_is_the_same(store: Store, recipe: str) -> None:
    """But for the scales' rounding, after which some weights are rounded to the other side; and nothing of a quantized product is left in float32."""
    after = ll.convert(quantized(store.serving("llama"), recipe), "float16")
    before = quantized(ll.convert(store.serving("llama"), "float16"), recipe)
    found, expected = (logits(Interpreter(g, BLOCKS, BLOCK)) for g in (after, before))
    assert worst_error(found, expected) < 0.1
    for graph in (after, before):
        for node in graph.surgeon.nodes:
            if node.op in ("QuantizeLinear", "DequantizeLinear"):
                assert node.inputs[1].dtype == np.float16, node.name
        scales = [array(c) for c in constants(graph.surgeon) if ".scale" in c.name]
        assert scales and all((s > 0).all() and np.isfinite(s).all() for s in scales)


@pytest.mark.parametrize(
    ("recipe", "dialect", "reason"),
    [
        ("int8_dynamic", 23, "a scale for each token, which TensorRT can't compute .* or target onnxruntime"),
        ("int8_asym", 23, "weights with zero points, which TensorRT has not: .* or target onnxruntime"),
        ("int8_g16", 23, "int8 weights by groups, which TensorRT has not: .* or target onnxruntime"),
        ("int4_rtn_g16", 17, "int4 by groups, which came with ONNX opset 21, and this TensorRT reads 17"),
        ("fp8", 17, "float8_e4m3fn, which came with ONNX opset 19, and this TensorRT reads 17"),
    ],
)
def test_what_it_lacks_is_refused(store: Store, recipe: str, dialect: int, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        lower(quantized(store.serving("llama"), recipe), dialect=dialect)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.layers.0")


def test_weak_typing(store: Store) -> None:
    """TensorRT 8.6 reads int8 with a scale a row."""
    graph = quantized(store.serving("llama"), "int8_w8a8")
    expected = logits(Interpreter(graph, BLOCKS, BLOCK))
    run = Execution(lower(graph, dialect=17, weak_type="float16"), BLOCKS, BLOCK)
    found = logits(run)
    wide = logits(Interpreter(store.serving("llama"), BLOCKS, BLOCK))
    assert 2 * worst_error(found, expected) < worst_error(found, wide), "the roundings are those of the recipe"
