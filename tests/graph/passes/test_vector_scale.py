from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, attention_graph, ops, refused, rows, same, small_graph

from llmlab.errors import UnsupportedModelError
from llmlab.graph.analysis.rows import mixing_node
from llmlab.graph.optimize import optimize
from llmlab.graph.passes.vector_scale import VectorScale

ONES = "value=float[1] {1.0}"


def norm(fill: str = f"<{ONES}>", op: str = "RMSNormalization<axis=-1>", width: str = "8"):
    return small_graph(
        f"m (float[B,S,{width}] x) => (float[B,S,{width}] y) {{ s = Shape(x) w = ConstantOfShape{fill}(s) y = {op}(x, w) }}"
    )


@pytest.mark.parametrize("op", ["RMSNormalization<axis=-1>", "RMSNormalization", "LayerNormalization<axis=2>"])
@pytest.mark.parametrize("fill", [f"<{ONES}>", "<value=float[1] {0.75}>", ""])
def test_a_scale_as_large_as_its_input_becomes_a_vector(op: str, fill: str) -> None:
    before = norm(fill, op)
    after, report = apply(VectorScale, before)
    assert report.rewrites == 1 and ops(after) == {op.partition("<")[0]: 1}
    scale = after.surgeon.nodes[0].inputs[1]
    assert scale.values.shape == (8,) and scale.values.dtype == np.float32
    feeds = {"x": rows(2, 3, 8)}
    same(before, after, feeds)
    scale.values = scale.values + np.float32(0.1)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        same(before, after, feeds)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"op": "RMSNormalization<axis=1>"}, "it normalises from axis 1 on, not over the last one alone"),
        ({"width": "D"}, "the width of its input isn't known"),
        ({"width": "1099511627776"}, "its input is 1099511627776 wide"),
    ],
)
def test_other_norms_stay(given: dict[str, str], reason: str) -> None:
    assert refused(VectorScale, norm(**given)) == reason


def test_a_scale_that_is_an_input_stays() -> None:
    graph = small_graph("m (float[B,8] x, float[8] w) => (float[B,8] y) { y = RMSNormalization(x, w) }")
    assert apply(VectorScale, graph)[1].matches == 0


def test_attention_over_normed_heads_is_served() -> None:
    """F.rms_norm without a weight over each head: its scale must not count tokens."""
    normed = (
        f"s = Shape(q) w = ConstantOfShape<{ONES}>(s) n = RMSNormalization(q, w) a = Attention<is_causal=1>(n, k, v)"
    )
    graph = attention_graph(normed)
    with pytest.raises(UnsupportedModelError, match="its inputs count tokens along different axes"):
        optimize(graph, without="vector_scale")
    serving = optimize(graph)
    assert ops(serving)["RMSNormalization"] == ops(serving)["PagedAttention"] == 1
    assert mixing_node(serving) is None
