"""Scales of a quantized KV cache from calibration, and what `quantize` makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import steps
from attention_forms import VOCAB, form, reference, worst
from steps import Plan

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.kernels.kv_cache import dequantize, per_channel, quantize
from llmlab.quant.kv import kv_scales
from llmlab.quant.kv_scales import CACHES, K_SCALE, V_SCALE, scale_of
from llmlab.quant.scheme import KVCache

FORM = {"rotary": 16, "window": 9}
LENGTHS = (1, 40, 64, 64, 64, 63)
DATA = [np.random.default_rng(n).integers(3, VOCAB, length) for n, length in enumerate(LENGTHS)]
PER = {"tensor": (0, 1), "head": (1,), "channel": ()}


def cached(graph: Graph) -> np.ndarray:
    """Largest keys and values [2, kv_heads, head_dim] that the NumPy plugin node writes into its pool for DATA."""
    most = []
    for ids in DATA:
        interpreter = Interpreter(graph, num_blocks=16, block_size=4)
        (batch, _), *_ = steps.batches(Plan(((len(ids),),)), VOCAB, np.arange(16, dtype=np.int32)[None], steps.all_rows)
        interpreter.step(steps.feeds(replace(batch, input_ids=ids)))
        most.append(np.nanmax(np.abs(interpreter.caches["kv_cache.0"]), axis=(1, 3)))
    found: np.ndarray = np.max(most, 0)
    return found


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("dtype", "top"), [("int8", 127), ("fp8", 448)])
def test_scales_are_the_largest_keys_as_they_lie_in_the_cache(dtype: str, top: int, per: str) -> None:
    graph = form(FORM)
    (found,) = kv_scales(graph, KVCache(dtype, per), DATA)
    for scale, most in zip(found, cached(graph), strict=True):
        expected = most.max(PER[per], keepdims=True) / top
        np.testing.assert_allclose(per_channel(scale, 2, 16), np.broadcast_to(expected, (2, 16)), rtol=1e-5)
        assert scale.shape == ((2, 16) if per == "channel" else (2,))


def test_keys_are_seen_behind_their_rotation() -> None:
    """Where a head turns, its largest channel is another one than in the rows that go in."""
    turned, straight = (kv_scales(form(o), KVCache("int8", "channel"), DATA)[0] for o in ({"rotary": 16}, {}))
    assert np.abs(turned.k / straight.k - 1).max() > 0.05
    np.testing.assert_allclose(turned.v, straight.v, rtol=1e-5)


@pytest.mark.parametrize("per", PER)
def test_in_four_bits_the_range_that_loses_least_is_chosen(per: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((500, 2 * 8)) * rng.uniform(0.5, 2, 16)).astype(np.float32)
    absmax, dtype = np.abs(rows).max(0), CACHES["int4"]

    def loss(scale: np.ndarray) -> np.ndarray:
        by, given = per_channel(scale, 2, 8), rows.reshape(-1, 2, 8)
        return ((dequantize(quantize(given, by, dtype), by) - given) ** 2).sum(0).sum(PER[per])

    plain, chosen = (scale_of(absmax, dtype, per, 2, sample) for sample in (None, rows))
    assert (loss(chosen) < 0.9 * loss(plain)).all() and (chosen <= plain).all()
    for other in (0.9, 1.1):
        assert (loss(chosen) <= loss(chosen * np.float32(other)) * 1.02).all()


def test_what_is_always_zero_has_a_scale() -> None:
    for per in PER:
        scale = scale_of(np.zeros(8, np.float32), CACHES["int8"], per, 2, np.zeros((4, 8), np.float32))
        np.testing.assert_array_equal(per_channel(scale, 2, 4), 1.0)


@pytest.mark.parametrize(
    ("recipe", "bound"), [("kv_int8", 0.03), ("kv_fp8", 0.15), ("kv_int4", 0.4), ({"kv_cache": {"per": "head"}}, 0.03)]
)
def test_a_recipe_quantizes_the_cache(recipe: Any, bound: float) -> None:
    graph = form(FORM)
    expected = reference(graph)
    narrow = ll.quantize(graph, recipe, DATA)
    assert graph.kv_layers()[0].dtype == np.float32, "the given graph is not changed"
    assert narrow.kv_layers()[0].dtype == CACHES["int8" if isinstance(recipe, dict) else recipe.removeprefix("kv_")]
    (node,) = (n for n in narrow.surgeon.nodes if n.op == "PagedAttention")
    assert all(node.inputs[i].shape == (2,) for i in (K_SCALE, V_SCALE))
    assert 1e-3 < worst(reference(narrow), expected) < bound
    assert narrow.history[-1].name == "quantize"
    again = ll.quantize(graph, recipe, DATA)
    assert worst(reference(again), reference(narrow)) == 0, "the same data give the same scales"


def test_what_does_not_fit_is_one_line() -> None:
    graph = form(FORM)
    with pytest.raises(InputError, match="calibration"):
        ll.quantize(graph, "kv_int8")
    with pytest.raises(InputError, match="expected at least 256"):
        ll.quantize(graph, "kv_int8", DATA[:2])
    with pytest.raises(InputError, match="quantized already"):
        ll.quantize(ll.quantize(graph, "kv_int8", DATA), "kv_int8", DATA)
    with pytest.raises(InputError, match="the model has 40 tokens"):
        ll.quantize(graph, "kv_int8", [np.full(64, VOCAB)] * 5)
