"""Mixtures of experts on ONNX Runtime: whichever lowering is taken, what the NumPy definition says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from small_graphs import CONFIG, ops, run

from llmlab.graph.edit import Editor
from llmlab.graph.graph import LLMLAB_DOMAIN, OPSET, Graph
from llmlab.graph.lower.onnxruntime_moe import lower_experts
from llmlab.graph.lower.weights import defer_weights
from llmlab.graph.store.lazy import Joined, Stacked
from llmlab.kernels.experts import ACTIVATIONS, gated, mixture_of_experts

HIDDEN, INNER, EXPERTS, K = 16, 24, 6, 2
PLAIN = {"activation": "silu", "interleaved": 0, "transposed": 0, "alpha": 1.0, "beta": 0.0, "limit": 0.0}
CLIPPED = {**PLAIN, "alpha": 1.702, "beta": 1.0, "limit": 0.7, "interleaved": 1}


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.5 * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def experts(
    attrs: dict[str, Any], bias: bool, route: str = "Softmax", stacked: bool = False
) -> tuple[Graph, list[Any]]:
    """A graph of a router (TopK of x's first columns, then `route`) and the node; and its weights."""
    weights: list[Any] = [random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)]
    if attrs["transposed"]:
        weights = [w.swapaxes(1, 2).copy() for w in weights]
    if bias:
        weights += [random(EXPERTS, 2 * INNER, seed=1), random(EXPERTS, HIDDEN, seed=1)]
    f32, i64 = np.dtype(np.float32), np.dtype(np.int64)
    x, y = gs.Variable("x", f32, ["T", HIDDEN]), gs.Variable("y", f32, ["T", HIDDEN])
    scores, top = gs.Variable("scores", f32, ["T", EXPERTS]), gs.Variable("top", f32, ["T", K])
    index, weight = gs.Variable("index", i64, ["T", K]), gs.Variable("weight", f32, ["T", K])
    constants = [gs.Constant(f"w{i}", w) for i, w in enumerate(weights)]
    if stacked:
        halves = [Stacked(list(weights[0][:, half])) for half in (slice(INNER), slice(INNER, None))]
        constants[0] = gs.Constant("w0", Joined(halves, 1))
    slices = [gs.Constant(f"s{i}", np.array([n])) for i, n in enumerate((0, EXPERTS, 1))]
    nodes = [
        gs.Node("Slice", "m/Slice", {}, [x, *slices], [scores]),
        gs.Node("TopK", "m/TopK", {}, [scores, gs.Constant("k", np.array([K]))], [top, index]),
        gs.Node(route, "m/Route", {}, [top], [weight]),
        gs.Node("MixtureOfExperts", "m/Experts", attrs, [x, index, weight, *constants], [y], domain=LLMLAB_DOMAIN),
    ]
    return Graph(gs.Graph(nodes, [x], [y], opset=OPSET), CONFIG), weights


def lowered(graph: Graph) -> Graph:
    result = graph.copy()
    lower_experts(Editor(result))
    result.surgeon.cleanup().toposort()
    defer_weights(result.surgeon)
    result.surgeon.toposort()
    return result


def expected(x: NDArray[np.float32], weights: list[Any], attrs: dict[str, Any], route: str) -> NDArray[np.float32]:
    index = np.argsort(-x[:, :EXPERTS], axis=1, kind="stable")[:, :K]
    top = np.take_along_axis(x, index, 1)
    weight = {
        "Softmax": lambda: np.exp(top) / np.exp(top).sum(1, keepdims=True),
        "Sigmoid": lambda: 1 / (1 + np.exp(-top)),
        "Relu": lambda: np.maximum(top, 0),
        "Neg": lambda: -top,
    }[route]()
    return mixture_of_experts(x, index, weight, *weights, **attrs)


CASES = [
    (PLAIN, False, "Softmax", True),
    (PLAIN, True, "Sigmoid", True),
    ({**PLAIN, "transposed": 1}, True, "Softmax", True),
    ({**CLIPPED, "transposed": 1}, True, "Softmax", True),
    (CLIPPED, False, "Relu", True),  # a weight of zero, and rows where all are zero
    (PLAIN, True, "Neg", False),  # weights that may be negative
    (CLIPPED, True, "Neg", False),
    *(
        ({**PLAIN, "activation": a, "transposed": t}, True, "Softmax", a == "silu")
        for a, t in itertools.product(ACTIVATIONS, (0, 1))
    ),
]


@pytest.mark.parametrize(("attrs", "bias", "route", "fused"), CASES)
def test_the_lowering_equals_the_definition(attrs: dict[str, Any], bias: bool, route: str, fused: bool) -> None:
    graph, weights = experts(attrs, bias, route)
    after = lowered(graph)
    assert ("MoE" in ops(after)) == fused and "MixtureOfExperts" not in ops(after)
    for tokens in (1, 3, 40):
        x = random(tokens, HIDDEN) * 3
        (found,) = run(after, {"x": x})
        wanted = expected(x, weights, attrs, route)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
        wrong = expected(x, weights, {**attrs, "interleaved": 1 - attrs["interleaved"]}, route)
        assert np.abs(found - wrong).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_stacks_are_taken_apart_and_joined_as_they_are_written(activation: str) -> None:
    attrs = {**PLAIN, "activation": activation}
    graph, weights = experts(attrs, False, stacked=True)
    x = random(5, HIDDEN)
    (found,) = run(lowered(graph), {"x": x})
    np.testing.assert_allclose(found, expected(x, weights, attrs, "Softmax"), atol=1e-5)


def test_no_tokens_at_all() -> None:
    for attrs in (PLAIN, {**PLAIN, "activation": "gelu"}):
        graph, _ = experts(attrs, True)
        (found,) = run(lowered(graph), {"x": np.zeros((0, HIDDEN), np.float32)})
        assert found.shape == (0, HIDDEN)


def test_the_definition_equals_torch() -> None:
    import torch

    x = random(7, 2 * INNER) * 6
    gate, up = torch.tensor(x).chunk(2, -1)
    for name, function in {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "relu": torch.relu,
    }.items():
        np.testing.assert_allclose(gated(x, activation=name), (function(gate) * up).numpy(), atol=1e-5)
    gate, up = torch.tensor(x[:, ::2]).clamp(max=2.0), torch.tensor(x[:, 1::2]).clamp(-2.0, 2.0)
    found = gated(x, interleaved=True, alpha=1.702, beta=1.0, limit=2.0)
    np.testing.assert_allclose(found, ((up + 1) * gate * torch.sigmoid(1.702 * gate)).numpy(), atol=1e-5)
