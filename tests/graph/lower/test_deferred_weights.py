"""Constant expressions in front of weights, computed when they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graphs import rows, run, small_graph

from llmlab.graph.graph import Graph
from llmlab.graph.lower.weights import defer_weights
from llmlab.graph.store.storage import read_onnx, write_onnx

TIED = """m (float[T,{width}] x) => (float[T,{height}] y, float[T,{width}] z) {{
    t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) i = ArgMax<axis=1, keepdims=0>(y) z = Gather(w, i) }}"""


@pytest.mark.parametrize("height", [1, 64, 100, 130])
def test_a_weight_read_as_it_is_and_transposed_is_written_right(tmp_path: Path, height: int) -> None:
    graph = small_graph(TIED.format(width=48, height=height), fold=False, w=rows(height, 48))
    feeds = {"x": rows(5, 48)}
    expected = run(graph, feeds)
    defer_weights(graph.surgeon)
    assert "Transpose" not in graph.op_counts()
    write_onnx(graph.surgeon, tmp_path)
    for found, wanted in zip(run(Graph(read_onnx(tmp_path), graph.config), feeds), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
