"""Graphs in a few lines of ONNX's text format, and what ONNX Runtime (its own optimisations off) says they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray

from llmlab.config import ModelConfig
from llmlab.graph.graph import Graph
from llmlab.graph.optimize import optimize
from llmlab.graph.passes.fold_constants import FoldConstants
from llmlab.graph.rewrite import Pass, PassReport
from llmlab.graph.store.storage import from_proto

CONFIG = ModelConfig("toy", vocab_size=12, hidden_size=8, num_layers=1, num_heads=2, max_position_embeddings=64)
HEADER = '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>'

# One attention layer between an embedding and a head: 2 query heads, 1 KV head of 4. `{}` is Attention's line.
ATTENTION = """model (int64[batch,sequence] input_ids, int64[batch,sequence] position_ids) => (float[batch,sequence,12] logits) {{
    x = Gather(embed, input_ids)
    tq = Transpose<perm=[1,0]>(wq)
    tk = Transpose<perm=[1,0]>(wk)
    tv = Transpose<perm=[1,0]>(wv)
    to = Transpose<perm=[1,0]>(wo)
    th = Transpose<perm=[1,0]>(embed)
    q0 = MatMul(x, tq)
    k0 = MatMul(x, tk)
    v0 = MatMul(x, tv)
    two = Constant<value_ints=[0, 0, 2, 4]>()
    one = Constant<value_ints=[0, 0, 1, 4]>()
    flat = Constant<value_ints=[0, 0, 8]>()
    q1 = Reshape(q0, two)
    k1 = Reshape(k0, one)
    v1 = Reshape(v0, one)
    q = Transpose<perm=[0,2,1,3]>(q1)
    k = Transpose<perm=[0,2,1,3]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)
    {}
    a1 = Transpose<perm=[0,2,1,3]>(a)
    a2 = Reshape(a1, flat)
    a3 = MatMul(a2, to)
    y = Add(x, a3)
    logits = MatMul(y, th)
}}"""

# What a mask is made of: each query's and each key's place, and which keys lie before a query.
POSITIONS = """
    n = Shape<start=1, end=2>(input_ids)
    n0 = Squeeze(n)
    i0 = Constant<value_int=0>()
    i1 = Constant<value_int=1>()
    row = Range(i0, n0, i1)
    ax1 = Constant<value_ints=[1]>()
    ax0 = Constant<value_ints=[0]>()
    query = Unsqueeze(row, ax1)
    key = Unsqueeze(row, ax0)
    causal = LessOrEqual(key, query)
"""


def weights(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def attention_graph(line: str = "a = Attention<is_causal=1>(q, k, v)", **more: NDArray) -> Graph:
    given = weights(embed=(12, 8), wq=(8, 8), wk=(4, 8), wv=(4, 8), wo=(8, 8))
    return small_graph(ATTENTION.format(line), **given, **more)


def small_graph(text: str, *, fold: bool = True, **initializers: NDArray) -> Graph:
    """A graph from ONNX text, with inferred shapes and nodes named `m.{output}/{op}`; its Constant nodes folded."""
    model = onnx.parser.parse_model(HEADER + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in initializers.items())
    for out in model.graph.output:
        if not out.type.tensor_type.shape.dim:  # `float y` leaves the shape to be inferred
            out.type.tensor_type.ClearField("shape")
    for node in model.graph.node:
        node.name = f"m.{node.output[0]}/{node.op_type}"
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    surgeon = from_proto(model)
    for tensor in surgeon.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = np.asarray(tensor.values)
    graph = Graph(surgeon, CONFIG)
    if fold:
        graph = optimize(graph, passes=[FoldConstants])
        graph.history.clear()
    return graph


def apply(make: Callable[[], Pass], graph: Graph) -> tuple[Graph, PassReport]:
    """The graph after one pass, and the pass's report."""
    result = optimize(graph, passes=[make])
    return result, result.history[-1]


def refused(make: Callable[[], Pass], graph: Graph) -> str:
    """The one reason a pass gives for not firing; it must have changed nothing."""
    _, report = apply(make, graph)
    assert report.rewrites == 0 and not report.diff.ops
    (miss,) = report.near_misses
    assert miss.node in {n.name for n in graph.surgeon.nodes}
    return miss.reason


def run(graph: Graph, feeds: Mapping[str, Any]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return [np.asarray(r) for r in session.run(None, {k: v for k, v in feeds.items() if k in names})]


def same(before: Graph, after: Graph, feeds: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """Both graphs compute the same, in ONNX Runtime with its own optimisations off."""
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        assert expected.shape == found.shape and expected.dtype == found.dtype
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def rows(*shape: int, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def padded_tokens(batch: int = 2, sequence: int = 9, seed: int = 3) -> dict[str, NDArray[np.int64]]:
    ids = np.random.default_rng(seed).integers(0, 12, (batch, sequence))
    return {"input_ids": ids, "position_ids": np.tile(np.arange(sequence), (batch, 1))}


def ops(graph: Graph) -> dict[str, int]:
    return graph.op_counts()
