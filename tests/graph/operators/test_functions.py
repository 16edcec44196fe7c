"""Nodes that call a function, in the passes and in the question whether tokens stay apart; a whole model with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import steps
import tiny
from my_operators import clipped_silu, running_mean, split_norm
from small_graphs import apply, ops, rows, same, small_graph
from steps import RAGGED, worst_error

import llmlab as ll
from llmlab.errors import UnsupportedModelError
from llmlab.graph.analysis.rows import mixing_node
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.operators.operator import operator
from llmlab.graph.passes.drop_batch_axis import DropBatchAxis


@operator("testlab::times")
class times:
    """x · w with a matrix of the caller's."""

    def shape(self, x, w):
        return (*x[:-1], w[1])

    def reference(self, x, w):
        return x @ w

    def onnx(self, op, x, w):
        return op.MatMul(x, w)


@operator("testlab::biased")
class biased:
    """Adds a bias of the body's own, of two axes."""

    def shape(self, x):
        return x

    def reference(self, x):
        return x + rows(1, 8)

    def onnx(self, op, x):
        return op.Add(x, rows(1, 8))


@operator("testlab::counted")
class counted:
    """How many rows there are."""

    def shape(self, x):
        return (1,)

    def reference(self, x):
        return np.asarray(x.shape[:1], np.float32)

    def onnx(self, op, x):
        return op.Cast(op.Shape(x, start=0, end=1), to=1)


def scaled_by_count() -> Graph:
    """A declared operator that is given the number of rows."""
    text = "m (float[T,8] x) => (float[T,8] y) { s = Shape<start=0, end=1>(x) n = Cast<to=1>(s) y = Mul(x, n) }"
    graph = small_graph(text)
    tensors = graph.surgeon.tensors()
    edit = Editor(graph)
    edit.replace(tensors["y"], scaled.add(edit, "m", [tensors["x"], tensors["n"]])[0])
    graph.surgeon.cleanup().toposort()
    return graph


@operator("testlab::scaled")
class scaled:
    """x · by."""

    def shape(self, x, by):
        return x

    def reference(self, x, by):
        return x * by

    def onnx(self, op, x, by):
        return op.Mul(x, by)


def with_node(op: Any, shape: list, *more: gs.Tensor, **attributes: Any) -> Graph:
    """x of `shape` → one node of a declared operator."""
    graph = small_graph("m (float[T,8] x) => (float[T,8] y) { y = Neg(x) }")
    x = gs.Variable("x", np.dtype(np.float32), shape)
    graph.surgeon.nodes, graph.surgeon.inputs = [], [x]
    graph.surgeon.outputs = op.add(Editor(graph), "m", [x, *more], **attributes)
    return graph


MATRIX = gs.Constant("w", rows(8, 300))


def test_what_keeps_tokens_apart_passes() -> None:
    assert mixing_node(with_node(clipped_silu, ["T", 8])) is None
    assert mixing_node(with_node(clipped_silu, [1, "T", 8])) is None
    assert mixing_node(with_node(split_norm, ["T", 8], scale=2.0)) is None
    assert mixing_node(with_node(times, ["T", 8], MATRIX)) is None


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (lambda: with_node(running_mean, ["T", 8]), "in its body, it works along the token axis (CumSum)"),
        (lambda: with_node(counted, ["T", 8]), "its output counts tokens"),
        (lambda: scaled_by_count(), "it depends on the number of tokens in the step"),
        (
            lambda: with_node(times, ["T", 8], gs.Variable("other", np.dtype(np.float32), [8, "T"])),
            "in its body, it multiplies tokens with each other (MatMul)",
        ),
        (lambda: with_node(split_norm, [8, "T"], scale=2.0), "in its body, its output has no token axis (Split)"),
    ],
)
def test_what_mixes_tokens_is_named(graph: Any, reason: str) -> None:
    found = mixing_node(graph())
    assert found is not None and found[1] == reason


FRAME = """m (float[T,8] x0) => (float[T,8] y) {
    batch = Constant<value_ints=[0]>() x = Unsqueeze(x0, batch) y1 = Neg(x) y = Squeeze(y1, batch) }"""


def lifted(op: Any, **attributes: Any) -> Graph:
    graph = small_graph(FRAME)
    neg = next(n for n in graph.surgeon.nodes if n.op == "Neg")
    edit = Editor(graph)
    (out,) = op.add(edit, "m", neg.inputs, **attributes)
    edit.replace(neg.outputs[0], out)
    graph.surgeon.cleanup().toposort()
    return graph


def test_the_batch_axis_sinks_through_an_elementwise_function() -> None:
    before = lifted(clipped_silu, limit=0.5)
    after, report = apply(DropBatchAxis, before)
    assert ops(after) == {"clipped_silu": 1} and not report.near_misses
    same(before, after, {"x0": rows(5, 8)})


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (running_mean, "running_mean is a function, and Shape in it is not known to allow it"),
        (biased, "biased is a function, and a constant of several axes in it is not known to allow it"),
    ],
)
def test_it_stays_in_front_of_any_other(op: Any, reason: str) -> None:
    before = lifted(op)
    after, report = apply(DropBatchAxis, before)
    assert [m.reason for m in report.near_misses] == [reason]
    same(before, after, {"x0": rows(5, 8)})


def model(op: Any, **attributes: Any) -> Any:
    """The tiny Llama of one layer, with `op` in the place of its SiLU."""
    import torch

    class Activation(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return op(x, **attributes)

    made = tiny.make_model(tiny.MODELS["one layer"])
    made.model.layers[0].mlp.act_fn = Activation()
    return made


def test_a_model_that_calls_it_goes_the_whole_road(tmp_path: Path) -> None:
    torch_model = model(clipped_silu, limit=0.5)
    plain = ll.export(torch_model)
    (node,) = (n for n in plain.surgeon.nodes if n.domain == "testlab")
    assert node.name == "model.layers.0.mlp.act_fn/clipped_silu" and dict(node.attrs) == {"limit": 0.5}
    serving = ll.Graph.load(ll.optimize(plain).save(tmp_path / "g"))
    (node,) = (n for n in serving.surgeon.nodes if n.domain == "testlab")
    assert list(node.outputs[0].shape) == ["T", 80] and len(serving.surgeon.functions) == 1
    engine = ll.build(serving, tmp_path / "e", max_tokens_per_step=32)
    expected = steps.cached_generation(torch_model, RAGGED, tiny.VOCAB)
    unclipped = steps.cached_generation(model(clipped_silu), RAGGED, tiny.VOCAB)
    backend = engine.backend(threads=1, max_num_seqs=8)
    interpreter = Interpreter(serving, num_blocks=48, block_size=4)
    slots = steps.slot_tables(RAGGED, [4, 1, 0, 6, 3])
    paged = steps.paged_tables(RAGGED, 4, 48)
    errors: dict[str, float] = {"engine": 0.0, "interpreter": 0.0, "without the clip": 0.0}
    for (batch, where), (other, _) in zip(
        steps.batches(RAGGED, tiny.VOCAB, slots, steps.all_rows),
        steps.batches(RAGGED, tiny.VOCAB, paged, steps.all_rows),
        strict=True,
    ):
        right, wrong = (np.array([logits[b][i] for b, i in where]) for logits in (expected, unclipped))
        found = backend.execute(batch)
        errors["engine"] = max(errors["engine"], worst_error(found, right))
        errors["without the clip"] = max(errors["without the clip"], worst_error(found, wrong))
        step = interpreter.step(steps.feeds(other))
        errors["interpreter"] = max(errors["interpreter"], worst_error(step, right))
    backend.close()
    assert errors["engine"] < 1e-4 and errors["interpreter"] < 1e-4 and errors["without the clip"] > 1e-2
    built = gs.import_onnx(__import__("onnx").load(tmp_path / "e" / "model.onnx", load_external_data=False))
    (node,) = (n for n in built.nodes if n.domain == "testlab")
    assert node.attrs["implementation"] == "onnx"


def test_a_model_with_one_that_mixes_tokens_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ll.optimize(ll.export(model(running_mean)))
    message = str(caught.value)
    assert (
        "model.layers.0.mlp.act_fn/running_mean (running_mean) may mix tokens of different sequences: in its body"
        in message
    )
