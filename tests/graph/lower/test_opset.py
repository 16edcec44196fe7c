"""What newer operators become for an older ONNX computes the same; what has no older form is refused by name."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from small_graphs import apply, ops, rows, run, small_graph

from llmlab.errors import UnsupportedModelError
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import KERNELS
from llmlab.graph.lower.opset import legalise
from llmlab.graph.passes.convert_precision import ConvertPrecision

X = rows(3, 2, 8) * 3
SCALE, BIAS = rows(8, seed=1), rows(8, seed=2)


def legal(graph: Graph, opset: int, keep: set[str] | None = None) -> Graph:
    result = graph.copy()
    legalise(Editor(result), opset, set() if keep is None else keep)
    return result


def of_x(body: str, result: str = "float[A,B,8] y", **given: np.ndarray) -> Graph:
    return small_graph(f"m (float[A,B,8] x) => ({result}) {{ {body} }}", **given)


CASES = {
    "rms": ("y = RMSNormalization<epsilon=0.01>(x, w)", {"w": SCALE}),
    "rms over two axes": ("y = RMSNormalization<axis=1>(x, w)", {"w": rows(2, 8)}),
    "layer": ("y = LayerNormalization<epsilon=0.01>(x, w)", {"w": SCALE}),
    "layer with bias": ("y = LayerNormalization<axis=2>(x, w, b)", {"w": SCALE, "b": BIAS}),
    "gelu": ("y = Gelu(x)", {}),
    "gelu by tanh": ('y = Gelu<approximate="tanh">(x)', {}),
    "mean": ("a = Constant<value_ints=[1, -1]>() y = ReduceMean(x, a)", {}),
    "largest": ("a = Constant<value_ints=[-1]>() y = ReduceMax<keepdims=0>(x, a)", {}),
    "sum of squares": ("y = ReduceSumSquare(x)", {}),
    "sum": ("a = Constant<value_ints=[0]>() y = ReduceSum(x, a)", {}),
    "split": ("a, b = Split<axis=-1, num_outputs=2>(x) y = Sub(b, a)", {}),
}


@pytest.mark.parametrize("opset", [17, 18, 20, 22])
@pytest.mark.parametrize("name", CASES)
def test_the_same_in_an_older_opset(name: str, opset: int) -> None:
    body, given = CASES[name]
    graph = of_x(body, "float y", **given)
    older = legal(graph, opset)
    assert older.surgeon.opset == opset and [d.version for d in older.to_onnx().opset_import if not d.domain] == [opset]
    for found, expected in zip(run(older, {"x": X}), run(graph, {"x": X}), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_the_newest_opset_has_stays() -> None:
    graph = of_x("a = RMSNormalization(x, w) b = LayerNormalization(a, w) y = Gelu(b)", w=SCALE)
    assert ops(legal(graph, 23)) == ops(graph)
    assert set(ops(legal(graph, 22))) & {"RMSNormalization", "LayerNormalization", "Gelu"} == {"Gelu"}


@pytest.mark.parametrize("name", ["rms", "layer with bias", "gelu by tanh"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_computes_wide(name: str, dtype: Any) -> None:
    """With values of a thousand a square overflows float16."""
    body, given = CASES[name]
    graph, _ = apply(lambda: ConvertPrecision(np.dtype(dtype)), of_x(body, **given))
    older = legal(graph, 17)
    kinds = {
        np.dtype(n.outputs[0].dtype).name for n in older.surgeon.nodes if n.op in ("Mul", "Div", "ReduceMean", "Add")
    }
    assert kinds == {"float32"} and {t.dtype for t in older.surgeon.inputs} == {np.dtype(dtype)}
    feeds = {"x": (X * 400).astype(dtype)}
    (found,) = ReferenceEvaluator(older.to_onnx(), new_ops=list(KERNELS)).run(None, feeds)
    (expected,) = ReferenceEvaluator(graph.to_onnx(), new_ops=list(KERNELS)).run(None, feeds)
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


def test_what_must_compute_in_float32() -> None:
    """Norms, and what is said to: its nodes are followed into what they become."""
    graph = of_x("a = RMSNormalization(x, w) b = Gelu(a) c = Gelu(b) y = Neg(c)", w=SCALE)
    first = next(n.name for n in graph.surgeon.nodes if n.op == "Gelu")
    keep = {first}
    older = legal(graph, 17, keep)
    kept = [n.op for n in older.surgeon.nodes if n.name in keep]
    assert kept.count("Erf") == 1 and kept.count("ReduceMean") == 1 and "Neg" not in kept
    names = [n.name for n in older.surgeon.nodes]
    assert len(set(names)) == len(names), "TensorRT names layers after nodes"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Mish(x)", "m.y/Mish: Mish of ONNX opset 17, which the target reads, does not exist"),
        (
            "p = Constant<value_ints=[1, 1]>() a = Constant<value_ints=[2]>() y = Pad(x, p, , a)",
            "m.y/Pad: Pad of ONNX opset 17, which the target reads, takes 3 inputs and not 4",
        ),
        (
            "s = Shape(x) i = Shape(s) o = Sub(i, i) y = ReduceMean(x, o)",
            "m.y/ReduceMean: ReduceMean over axes that are computed in the step",
        ),
    ],
)
def test_what_has_no_older_form_is_refused(body: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        legal(small_graph(f"m (float[A,B,8] x) => (float y) {{ {body} }}", fold=False), 17)
    assert str(error.value) == reason
