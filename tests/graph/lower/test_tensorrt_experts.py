"""Mixtures of experts in dense products: what the NumPy definition says, for any routing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from small_graphs import CONFIG, ops, run

from llmlab.graph.edit import Editor
from llmlab.graph.graph import LLMLAB_DOMAIN, OPSET, Graph
from llmlab.graph.lower.opset import legalise
from llmlab.graph.lower.tensorrt_experts import expand_experts
from llmlab.graph.lower.weights import defer_weights
from llmlab.kernels.experts import ACTIVATIONS, mixture_of_experts

HIDDEN, INNER, EXPERTS, K = 16, 24, 6, 2
PLAIN = {"activation": "silu", "interleaved": 0, "transposed": 0, "alpha": 1.0, "beta": 0.0, "limit": 0.0}
CLIPPED = {**PLAIN, "alpha": 1.702, "beta": 1.0, "limit": 0.7, "interleaved": 1}
WIDE = np.dtype(np.float32)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.5 * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def weights(attrs: dict[str, Any], bias: bool) -> list[NDArray[np.float32]]:
    result = [random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)]
    if attrs["transposed"]:
        result = [w.swapaxes(1, 2).copy() for w in result]
    return result + ([random(EXPERTS, 2 * INNER, seed=1), random(EXPERTS, HIDDEN, seed=1)] if bias else [])


def lowered(attrs: dict[str, Any], given: list[Any], dtype: np.dtype = WIDE, opset: int = OPSET) -> Graph:
    """A graph of the node alone, whose routing is an input."""
    x, y = (gs.Variable(n, dtype, ["T", HIDDEN]) for n in "xy")
    index, weight = gs.Variable("index", np.dtype(np.int64), ["T", K]), gs.Variable("weight", WIDE, ["T", K])
    inputs = [x, index, weight, *(gs.Constant(f"w{i}", w.astype(dtype)) for i, w in enumerate(given))]
    node = gs.Node("MixtureOfExperts", "m/Experts", attrs, inputs, [y], domain=LLMLAB_DOMAIN)
    graph = Graph(gs.Graph([node], [x, index, weight], [y], opset=OPSET), CONFIG)
    edit = Editor(graph)
    keep: set[str] = set()
    expand_experts(edit, keep)
    legalise(edit, opset, keep)
    defer_weights(graph.surgeon)
    assert "MixtureOfExperts" not in ops(graph) and keep <= {n.name for n in graph.surgeon.nodes}
    return graph


def step(tokens: int) -> dict[str, NDArray[Any]]:
    """The first row names one expert twice, the second weighs one with nothing, the third one with less."""
    rng = np.random.default_rng(tokens)
    index, weight = rng.integers(0, EXPERTS, (tokens, K)), random(tokens, K, seed=3)
    index[:1], weight[1:2, 0], weight[2:3, 0] = 4, 0, -1
    return {"x": random(tokens, HIDDEN) * 3, "index": index, "weight": weight}


CASES = [
    (PLAIN, False),
    (CLIPPED, True),
    ({**CLIPPED, "transposed": 1}, True),
    *(({**PLAIN, "activation": a, "transposed": 1}, False) for a in ACTIVATIONS),
]


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize(("attrs", "bias"), CASES)
def test_the_lowering_equals_the_definition(attrs: dict[str, Any], bias: bool, opset: int) -> None:
    given = weights(attrs, bias)
    graph = lowered(attrs, given, opset=opset)
    for tokens in (1, 3, 40):
        feeds = step(tokens)
        (found,) = run(graph, feeds)
        expected = mixture_of_experts(*feeds.values(), *given, **attrs)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
        wrong = mixture_of_experts(*feeds.values(), *given, **{**attrs, "interleaved": 1 - attrs["interleaved"]})
        assert np.abs(found - wrong).max() > 1e-2 * np.abs(expected).max()


def test_float16_is_summed_in_float32() -> None:
    given = weights(PLAIN, True)
    graph = lowered(PLAIN, given, np.dtype(np.float16))
    feeds = step(40)
    (found,) = run(graph, {**feeds, "x": feeds["x"].astype(np.float16)})
    expected = mixture_of_experts(*feeds.values(), *given, **PLAIN)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
    total = next(n for n in graph.surgeon.nodes if n.op == "ReduceSum" and n.outputs[0].shape == ["T", HIDDEN])
    assert total.outputs[0].dtype == np.float32


def test_an_expert_that_overflows_for_rows_of_others_is_not_seen() -> None:
    given = weights(PLAIN, False)
    given[1][0] = 6e4 * np.sign(given[1][0])
    feeds = step(40)
    feeds["index"] = np.maximum(feeds["index"], 1)
    (found,) = run(lowered(PLAIN, given, np.dtype(np.float16)), {**feeds, "x": feeds["x"].astype(np.float16)})
    expected = mixture_of_experts(*feeds.values(), *given, **PLAIN)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())


def test_no_weight_is_computed_until_it_is_written() -> None:
    graph = lowered(PLAIN, weights(PLAIN, True))
    assert "Transpose" not in ops(graph)
