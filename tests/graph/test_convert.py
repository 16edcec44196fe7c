"""float16 and bfloat16: what narrows, what stays wide, how many Casts that takes, and how far the logits move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import steps
import tiny
from conftest import Store
from onnx.reference import ReferenceEvaluator
from small_graphs import apply, ops, rows, run, small_graph, weights
from steps import Plan, worst_error

import llmlab as ll
from llmlab.errors import InputError, UnsupportedModelError
from llmlab.graph import interpret
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import KERNELS, Interpreter
from llmlab.graph.passes.convert_precision import ConvertPrecision
from llmlab.graph.store.storage import constants

HALF, BRAIN = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
PLAN = Plan(((9, 1, 1), (1, 1, 1), (0, 4, 1)))
both = pytest.mark.parametrize("precision", ["float16", "bfloat16"])


def logits(graph: Graph) -> np.ndarray:
    interpreter = Interpreter(graph, num_blocks=16, block_size=4)
    tables = steps.paged_tables(PLAN, 4, 16)
    result = [interpreter.step(steps.feeds(b)) for b, _ in steps.batches(PLAN, tiny.VOCAB, tables, steps.all_rows)]
    assert all(r.dtype == np.float32 for r in result)
    return np.concatenate(result)


def torch_error(model: Any, precision: str) -> float:
    """How far transformers' own logits move when its model is cast."""
    import copy

    import torch

    narrow = copy.deepcopy(model).to(getattr(torch, precision))
    moved = []
    for ids in PLAN.tokens(tiny.VOCAB):
        with torch.no_grad():
            wide, cast = (m(input_ids=torch.tensor(ids[None])).logits[0].float().numpy() for m in (model, narrow))
        moved.append(worst_error(cast, wide))
    return max(moved)


@both
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_move_no_more_than_transformers_do(store: Store, name: str, precision: str) -> None:
    graph = store.serving(name)
    narrow = ll.convert(graph, precision)
    error = worst_error(logits(narrow), logits(graph))
    assert 1e-5 < error < 2 * torch_error(store.model(name), precision)


@both
def test_one_cast_is_enough(store: Store, precision: str) -> None:
    """A Llama needs one, from the head's product to the logits."""
    graph = store.serving("llama")
    narrow = ll.convert(graph, precision)
    assert ops(narrow) == ops(graph) | {"Cast": 1}
    (cast,) = (n for n in narrow.surgeon.nodes if n.op == "Cast")
    assert cast.name == "lm_head/Cast" and cast.outputs[0].name == "logits"
    report = narrow.history[-1]
    assert report.name == "convert_precision" and report.rewrites == 1
    assert len(graph.history) == len(narrow.history) - 1, "the input is not changed"


@both
def test_types(store: Store, precision: str, tmp_path: Path) -> None:
    graph = ll.convert(store.serving("llama"), precision)
    graph.save(tmp_path / "g")
    for narrow in (graph, Graph.load(tmp_path / "g")):
        caches = {np.dtype(t.dtype).name for t in narrow.surgeon.inputs if t.name.startswith("kv_cache.")}
        assert caches == {precision}
        attention = next(n for n in narrow.surgeon.nodes if n.op == "PagedAttention")
        assert {np.dtype(attention.inputs[i].dtype).name for i in (8, 9)} == {"float32"}, "RoPE tables"
        matrices = [t for t in constants(narrow.surgeon) if len(t.shape) == 2 and t.name not in _tables(attention)]
        assert matrices and {np.dtype(t.dtype).name for t in matrices} == {precision}
    before, after = store.serving("llama").weight_bytes, graph.weight_bytes
    assert after < 0.6 * before
    np.testing.assert_array_equal(logits(Graph.load(tmp_path / "g")), logits(graph))


def _tables(attention: Any) -> set[str]:
    return {attention.inputs[i].name for i in (8, 9)}


def test_weights_stored_narrow_stay_maps_into_the_checkpoint(tmp_path: Path) -> None:
    import torch

    model = tiny.make_model(tiny.MODELS["llama3"] | {"num_hidden_layers": 1}).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "c")
    graph = ll.optimize(ll.export(tmp_path / "c"))
    narrow = ll.convert(graph, "bfloat16")
    matrices = [t for t in constants(narrow.surgeon) if t.dtype == BRAIN and len(t.shape) == 2]
    assert len(matrices) == 8, "seven of the layer and the embedding, which is the head as well"
    assert all(isinstance(t._values, np.memmap) for t in matrices)
    assert ops(narrow)["Cast"] == 1, "none of those that widened the weights is left"
    assert worst_error(logits(narrow), logits(graph)) < 0.15
    half = ll.convert(graph, "float16")  # the other type: by way of float32, when it is written
    assert ops(half)["Cast"] == 1 and worst_error(logits(half), logits(graph)) < 0.02


def test_norms_in_half_precision_would_be_seen(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a residual stream of a thousand a square overflows float16, unless the norm computes wide."""
    graph = store.serving("llama").copy()
    embedding = next(n for n in graph.surgeon.nodes if n.op == "Gather" and n.inputs[1].name == "input_ids").inputs[0]
    embedding.values = np.asarray(embedding.values) * np.float32(10_000)
    expected = logits(graph)
    narrow = ll.convert(graph, "float16")
    assert worst_error(logits(narrow), expected) < 0.05
    plain = [k for k in KERNELS if k.__name__ != "RMSNormalization"]
    monkeypatch.setattr(interpret, "KERNELS", plain)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        assert worst_error(logits(narrow), expected) > 0.5


def half(text: str, **given: np.ndarray) -> tuple[Graph, Graph]:
    graph = small_graph(text, **given)
    return graph, apply(lambda: ConvertPrecision(HALF), graph)[0]


def check(before: Graph, after: Graph, feeds: dict[str, np.ndarray], tolerance: float = 5e-3) -> None:
    narrow = {k: v.astype(HALF) if v.dtype == np.float32 else v for k, v in feeds.items()}
    found = ReferenceEvaluator(after.to_onnx(), new_ops=list(KERNELS)).run(None, narrow)
    for expected, result in zip(run(before, feeds), found, strict=True):
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_a_router_stays_wide() -> None:
    """Its product, its softmax, its choice; two experts that are nearly alike would trade places in float16."""
    before, after = half(
        """m (float[T,8] x) => (float[T,2] w, int64[T,2] i) {
            k = Constant<value_ints=[2]>()
            t = Transpose<perm=[1,0]>(gate)
            l = MatMul(x, t)
            s = Softmax(l)
            w, i = TopK(s, k)
        }""",
        **weights(gate=(5, 8)),
    )
    assert ops(after) == ops(before) | {"Cast": 1}
    product = next(n for n in after.surgeon.nodes if n.op == "MatMul")
    assert {np.dtype(t.dtype).name for t in (*product.inputs, *product.outputs)} == {"float32"}
    check(before, after, {"x": rows(6, 8)})


def test_a_norm_that_was_not_fused_computes_wide() -> None:
    before, after = half(
        """m (float[T,8] x) => (float[T,8] y) {
            axes = Constant<value_ints=[-1]>()
            e = Constant<value_float=1e-6>()
            s = Mul(x, x)
            m = ReduceMean<keepdims=1>(s, axes)
            a = Max(m, e)
            r = Sqrt(a)
            n = Div(x, r)
            y = MatMul(n, w)
        }""",
        **weights(w=(8, 8)),
    )
    kinds = {n.op: np.dtype(n.outputs[0].dtype).name for n in after.surgeon.nodes if n.op != "Cast"}
    assert kinds == dict.fromkeys(("Mul", "ReduceMean", "Max", "Sqrt", "Div"), "float32") | {"MatMul": "float16"}
    assert ops(after)["Cast"] == 3, "x, the norm, the result"
    check(before, after, {"x": rows(6, 8) * 500})


def test_what_follows_the_head_is_wide() -> None:
    """gemma2 caps its logits, granite scales them."""
    before, after = half(
        """m (float[T,8] x) => (float[T,8] y) {
            c = Constant<value_float=30.0>()
            l = MatMul(x, w)
            d = Div(l, c)
            t = Tanh(d)
            y = Mul(t, c)
        }""",
        **weights(w=(8, 8)),
    )
    kinds = {n.op: np.dtype(n.outputs[0].dtype).name for n in after.surgeon.nodes}
    assert kinds == {"MatMul": "float16", "Cast": "float32", "Div": "float32", "Tanh": "float32", "Mul": "float32"}
    check(before, after, {"x": rows(6, 8)})


def test_numbers_that_half_precision_does_not_have_keep_their_node_wide() -> None:
    before, after = half(
        """m (float[T,8] x, bool[T,1] b) => (float[T,8] y) {
            far = Constant<value_float=-1e9>()
            z = MatMul(x, w)
            s = Where(b, z, far)
            r = Relu(s)
            y = MatMul(r, w)
        }""",
        **weights(w=(8, 8)),
    )
    kinds = {n.op: np.dtype(n.outputs[0].dtype).name for n in after.surgeon.nodes if n.op in ("Where", "Relu")}
    assert kinds["Where"] == "float32"
    check(before, after, {"x": rows(6, 8), "b": np.arange(6)[:, None] % 2 == 0})


def test_a_weight_beyond_float16_is_named(store: Store) -> None:
    graph = store.serving("llama").copy()
    weight = next(t for t in constants(graph.surgeon) if t.name == "model.layers.1.mlp.down_proj.weight")
    weight.values = np.asarray(weight.values).copy()
    weight.values[3, 4] = 70000
    with pytest.raises(UnsupportedModelError) as caught:
        ll.convert(graph, "float16")
    assert str(caught.value) == (
        "model.layers.1.mlp.down_proj.weight: holds 7e+04, beyond float16's largest 6.55e+04: convert to bfloat16"
    )
    weight.values[3, 4] = np.nan
    with pytest.raises(UnsupportedModelError, match="holds nan"):
        ll.convert(graph, "float16")
    ll.convert(graph, "bfloat16")


def test_what_cannot_be_converted_is_one_line(store: Store) -> None:
    graph = store.serving("llama")
    with pytest.raises(InputError, match="precision is 'int8'; available: float16, bfloat16"):
        ll.convert(graph, "int8")
    with pytest.raises(InputError, match="expected a serving graph"):
        ll.convert(store.plain("llama"), "float16")
    with pytest.raises(InputError, match="the graph is in float16 already"):
        ll.convert(ll.convert(graph, "float16"), "bfloat16")
