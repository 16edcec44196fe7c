"""Declared operators: what a declaration gives, what is refused, and that all implementations agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from my_operators import clipped_silu, running_mean, split_norm
from small_graphs import ops, rows, run, same, small_graph

import llmlab as ll
from llmlab.config import ModelConfig
from llmlab.errors import GraphError, InputError
from llmlab.graph.edit import Editor, scope
from llmlab.graph.interpret import Interpreter
from llmlab.graph.operators.declaration import find
from llmlab.graph.operators.operator import Operator, operator
from llmlab.graph.rewrite import Match, Pass

X = rows(5, 8) * 4


def test_a_declaration_is_called_shown_and_found() -> None:
    assert repr(clipped_silu) == "testlab::clipped_silu(x, *, limit: float = 7.0): 6 nodes in ONNX, a Triton kernel"
    assert "scale: float," in repr(split_norm) and "no Triton kernel" in repr(split_norm)
    assert clipped_silu.__doc__ == "x · sigmoid(x), at most `limit`."
    assert find("testlab", "clipped_silu") is clipped_silu and find(None, "clipped_silu") is None
    np.testing.assert_allclose(clipped_silu(X, limit=1.0), np.minimum(X / (1 + np.exp(-X)), 1.0), rtol=1e-6)
    assert clipped_silu(X).max() > 5 and clipped_silu(X, limit=1).max() == 1


def test_the_body_is_a_function_with_attributes_and_defaults() -> None:
    assert [n.op_type for n in clipped_silu.function.node] == [
        "Sigmoid",
        "Mul",
        "Constant",
        "CastLike",
        "Min",
        "Identity",
    ]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in clipped_silu.function.attribute_proto} == {
        "implementation": b"onnx",
        "limit": 7.0,
    }
    assert list(split_norm.function.attribute) == ["scale"] and len(split_norm.function.output) == 2


def test_body_and_reference_agree() -> None:
    assert clipped_silu.check(X, X[0], X[:, None], X[:0]) < 1e-5
    assert clipped_silu.check(X, limit=0.25) < 1e-5, "the attribute reaches the body"
    assert 0 < clipped_silu.check(X.astype(np.float16)) < 1e-2, "constants take the type of the operand"
    assert running_mean.check(X) < 1e-6 and split_norm.check(X, scale=3.0) < 1e-6


def test_shapes_by_the_rule_with_symbols() -> None:
    assert clipped_silu.shapes(["T", 8]) == [["T", 8]] and clipped_silu.shapes([None, "T"]) == [[None, "T"]]
    assert split_norm.shapes(["B", "T", 8], scale=1.0) == [["B", "T", 4], ["B", "T", 1]]
    assert split_norm.shapes(["T", "H"], scale=1.0) == [["T", None], ["T", 1]], "half of a symbol is not known"
    with pytest.raises(InputError, match=r"testlab::split_norm: its shape\(\) fails for \[\]: IndexError"):
        split_norm.shapes([], scale=1.0)


def test_types_follow_the_body() -> None:
    assert split_norm.dtypes(np.dtype(np.float16), scale=1.0) == [np.float16, np.float16]
    with pytest.raises(InputError, match="clipped_silu: its body does not take inputs of type int64"):
        clipped_silu.dtypes(np.dtype(np.int64))


def declare(name: str = "testlab::odd", annotations: dict[str, Any] | None = None, **members: Any) -> Operator:
    """Declares an operator that gives its input back, with some members another."""
    plain = {
        "shape": lambda self, x: x,
        "reference": lambda self, x: x,
        "onnx": lambda self, op, x: op.Identity(x),
        "__annotations__": annotations or {},
    }
    kept = {k: v for k, v in {**plain, **members}.items() if v is not None}
    return operator(name, replace=True)(type("odd", (), kept))


WRONG = {
    "no reference": ({"reference": None}, "no method 'reference'; expected shape, reference, onnx"),
    "inputs differ": (
        {"onnx": lambda self, op, x, y: x},
        "reference() takes 1 inputs, onnx() takes 2",
    ),
    "no inputs": ({"reference": lambda self: 1}, "reference() takes no input; expected at least one beside self"),
    "optional input": (
        {"shape": lambda self, x=None: x},
        "the inputs of shape() must be plain parameters without defaults",
    ),
    "unknown operator": (
        {"onnx": lambda self, op, x: op.Sigmoyd(x)},
        "its onnx() fails: ONNX has no operator 'Sigmoyd' (nearest: Sigmoid",
    ),
    "too many operands": (
        {"onnx": lambda self, op, x: op.Sigmoid(x, x)},
        "its onnx() fails: Sigmoid takes at most 1 operands, got 2",
    ),
    "unknown attribute": (
        {"onnx": lambda self, op, x: op.Softmax(x, axes=1)},
        "its onnx() fails: Softmax has no attribute 'axes' (nearest: axis)",
    ),
    "attribute of a wrong type": (
        {"onnx": lambda self, op, x: op.Softmax(x, axis="last")},
        "its onnx() fails: Softmax's attribute 'axis' can't be 'last'",
    ),
    "operand of a wrong type": (
        {"onnx": lambda self, op, x: op.Add(x, "one")},
        "its onnx() fails: an operand is 'one'; expected a value, an attribute, a number or an array",
    ),
    "returns no value": (
        {"onnx": lambda self, op, x: 3},
        "its onnx() returns 3; expected a value or a tuple of values",
    ),
    "random": (
        {"onnx": lambda self, op, x: op.RandomNormalLike(x)},
        "RandomNormalLike gives something else each time; an operator depends on its inputs alone",
    ),
    "computes with an attribute": (
        {"onnx": lambda self, op, x: op.Neg(x) if self.k else x, "annotations": {"k": int}},
        "k has no value while the body is written: hand it to an operator as it is",
    ),
    "attribute of another kind": (
        {"onnx": lambda self, op, x: op.Softmax(x, axis=self.k), "annotations": {"k": float}},
        "Softmax's attribute 'axis' is of another type than k",
    ),
    "attribute type": ({"annotations": {"k": dict}}, "k is annotated <class 'dict'>; expected one of float, int, str"),
    "default type": ({"annotations": {"k": int}, "k": "a"}, "k is 'a', expected int"),
    "bool default": ({"annotations": {"k": int}, "k": True}, "k is True, expected int"),
    "called like an input": ({"annotations": {"x": int}}, "an attribute can't be called 'x': choose another name"),
    "reserved attribute": ({"annotations": {"implementation": str}}, "an attribute can't be called 'implementation'"),
    "annotation of nothing": ({"annotations": {"k": "Nothing"}}, "an annotation can't be read: NameError"),
}


@pytest.mark.parametrize(("members", "reason"), WRONG.values(), ids=WRONG)
def test_declarations_that_are_refused(members: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        declare(**members)
    message = str(caught.value)
    assert message.startswith("testlab::odd: ") and reason in message and "\n" not in message


NAMES = {
    "clipped_silu": "the operator's name is 'clipped_silu'; expected 'domain::name', such as 'mylab::clipped_silu'",
    "my lab::x": "the operator's name is 'my lab::x'",
    "Lab::x": "the operator's name is 'Lab::x'",
    "a::b::c": "the operator's name is 'a::b::c'",
    "llmlab::mine": "llmlab::mine: the domain 'llmlab' is reserved: choose one of your own",
    "aten::add": "the domain 'aten' is reserved",
    "mylab::Softmax": "ONNX has an operator 'Softmax', which passes would take it for: choose another name",
}


@pytest.mark.parametrize(("name", "reason"), NAMES.items(), ids=NAMES)
def test_names_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        declare(name)
    assert str(caught.value).startswith(reason) or reason in str(caught.value)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(InputError) as caught:
        operator("testlab::clipped_silu")(type("other", (), {}))
    assert "no method" in str(caught.value)
    declared = clipped_silu._declaration
    with pytest.raises(InputError, match="declared already: choose another name, or pass replace=True"):
        operator("testlab::clipped_silu")(declared)
    first, second = declare("testlab::again"), declare("testlab::again")
    assert find("testlab", "again") is second is not first
    with pytest.raises(InputError, match="decorates a class, got function"):
        operator("testlab::f")(lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: clipped_silu(X, X), "testlab::clipped_silu takes 1 inputs (x), got 2"),
        (lambda: clipped_silu(X, limits=1.0), "testlab::clipped_silu has no attribute 'limits'; it has limit"),
        (lambda: clipped_silu(X, limit="a"), "testlab::clipped_silu: limit is 'a', expected float"),
        (lambda: split_norm(X), "testlab::split_norm wants the attribute 'scale': it has no default"),
        (lambda: split_norm(X, scale=1, parts=[1, 0.5]), "testlab::split_norm: parts is 0.5, expected int"),
        (lambda: running_mean.launch((3,)), "testlab::running_mean declares no Triton kernel"),
        (lambda: clipped_silu.check(), "testlab::clipped_silu: nothing to check; pass an array"),
    ],
)
def test_calls_that_are_refused(call: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value).startswith(reason)


DISAGREE = {
    "body computes something else": (
        {"onnx": lambda self, op, x: op.Mul(x, 1.001)},
        "example 1: body and reference differ by 1.0e-03 of the largest value, more than 1e-04",
    ),
    "body has another shape": (
        {"onnx": lambda self, op, x: op.Unsqueeze(x, [0])},
        "example 1: the body gives float32[1, 5, 8], the reference float32[5, 8]",
    ),
    "reference has another type": (
        {"reference": lambda self, x: x.astype(np.float64)},
        "example 1: the body gives float32[5, 8], the reference float64[5, 8]",
    ),
    "shape rule says something else": (
        {"shape": lambda self, x: x[1:]},
        "example 1: the reference gives shape [5, 8], shape() says [8]",
    ),
    "infinities": (
        {"reference": lambda self, x: np.where(x > 0, np.inf, x).astype(np.float32)},
        "example 1: body and reference differ by inf",
    ),
    "body does not run": (
        {"onnx": lambda self, op, x: op.MatMul(x, x)},
        "its body does not run",
    ),
}


@pytest.mark.parametrize(("members", "reason"), DISAGREE.values(), ids=DISAGREE)
def test_a_wrong_implementation_is_caught(members: dict[str, Any], reason: str) -> None:
    assert declare().check(X) == 0
    with pytest.raises(InputError) as caught:
        declare(**members).check(X)
    message = str(caught.value)
    assert message.startswith("testlab::odd") and reason in message and "\n" not in message


def test_torch_tensors_go_through_the_registered_operator() -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    assert np.array_equal(clipped_silu(x, limit=1.0).numpy(), clipped_silu(X, limit=1.0))
    assert clipped_silu(x.bfloat16()).dtype == torch.bfloat16
    halves = split_norm(x, scale=2.0, parts=[3])
    assert [tuple(h.shape) for h in halves] == [(5, 4), (5, 1)]
    torch.library.opcheck(clipped_silu.torch_op, (x,), {"limit": 2.0}, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(split_norm.torch_op, (x,), {"scale": 2.0}, test_utils=("test_schema", "test_faketensor"))
    again = declare("testlab::twice", onnx=lambda self, op, x: op.Identity(x))
    assert torch.equal(again(x), x)
    again = declare("testlab::twice", reference=lambda self, x: x + 1)
    assert torch.equal(again(x), x + 1), "a cell that is run again registers the new one"


class InsertClippedSilu(Pass):
    """Min(x · sigmoid(x), c) → testlab::clipped_silu."""

    name = "insert_clipped_silu"

    def pattern(self, node: Any) -> Match | None:
        return Match(node=node) if node.op == "Min" else None

    def rewrite(self, edit: Editor, match: Match) -> None:
        product = match.node.inputs[0].inputs[0]
        limit = float(match.node.inputs[1].values)
        (out,) = clipped_silu.add(edit, scope(match.node), [product.inputs[0]], limit=limit)
        edit.replace(match.node.outputs[0], out)


PATTERN = "m (float[N,8] x) => (float[N,8] y) { s = Sigmoid(x) p = Mul(x, s) y = Min(p, c) }"


def test_a_pass_inserts_the_operator_and_every_step_carries_its_body(tmp_path: Path) -> None:
    before = small_graph(PATTERN, c=np.array(0.5, np.float32))
    after = ll.optimize(before, passes=[InsertClippedSilu])
    assert ops(after) == {"clipped_silu": 1} and not before.surgeon.functions
    (out,) = after.surgeon.outputs
    assert out.dtype == np.float32 and out.shape == ["N", 8], "by the shape rule"
    feeds = {"x": X}
    same(before, after, feeds)
    assert np.array_equal(np.minimum(run(after, feeds)[0], 0.5), run(after, feeds)[0]), "the attribute reaches the body"
    after.config = ModelConfig.from_hf({**tiny._COMMON, "model_type": "llama"})
    saved = ll.Graph.load(after.save(tmp_path / "g"))
    same(after, saved, feeds, 0)
    same(after, saved.copy(), feeds, 0)
    (piece,) = ll.cut(after, lambda node: node.op == "clipped_silu").pieces
    same(after, piece.graph, feeds, 0)
    (reference,) = onnx.reference.ReferenceEvaluator(saved.to_onnx()).run(None, feeds)
    np.testing.assert_allclose(reference, clipped_silu(X, limit=0.5), rtol=1e-5)


def test_pieces_carry_only_what_they_call() -> None:
    after = ll.optimize(small_graph(PATTERN, c=np.array(0.5, np.float32)), passes=[InsertClippedSilu])
    (out,) = after.surgeon.outputs
    edit = Editor(after)
    edit.surgeon.outputs = [edit.add("Neg", "m", [out], dtype=out.dtype, shape=out.shape)]
    pieces = ll.cut(after, lambda node: node.op == "Neg").pieces
    assert [[f.name for f in p.graph.surgeon.functions] for p in pieces] == [["clipped_silu"], []]


def test_a_copy_has_functions_of_its_own() -> None:
    after = ll.optimize(small_graph(PATTERN, c=np.array(0.5, np.float32)), passes=[InsertClippedSilu])
    copy = after.copy()
    copy.surgeon.functions[0].nodes[0].op = "Tanh"
    same(after, small_graph(PATTERN, c=np.array(0.5, np.float32)), {"x": X})


def test_another_body_under_the_same_name_is_one_line() -> None:
    graph = small_graph(PATTERN, c=np.array(0.5, np.float32))
    edit = Editor(graph)
    for _ in range(2):
        declare("testlab::changed").add(edit, "m", [graph.surgeon.inputs[0]])
    assert len(graph.surgeon.functions) == 1, "the same body once"
    changed = declare("testlab::changed", onnx=lambda self, op, x: op.Neg(x))
    with pytest.raises(GraphError, match="the graph has another body for testlab::changed than the one declared now"):
        changed.add(edit, "m", [graph.surgeon.inputs[0]])


KERNEL = """
import numpy as np, torch
from my_operators import clipped_silu
for shape in ((5, 8), (1, 1), (70,), (3, 64, 2)):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 4
    kernel, grid, scalars, constants = clipped_silu.launch(shape, limit=1.5)
    out = torch.full(shape, float("nan"))
    kernel[grid](torch.from_numpy(x), out, *scalars, **constants)
    np.testing.assert_allclose(out.numpy(), clipped_silu(x, limit=1.5), rtol=1e-5, atol=1e-6)
    wrong = clipped_silu(x, limit=0.0)
    assert np.abs(out.numpy() - wrong).max() > 1e-2 or shape == (1, 1)
print("equal")
"""


def test_the_kernel_in_tritons_interpreter_equals_the_reference() -> None:
    pytest.importorskip("triton", reason="the kernel needs triton: pip install 'llmlab[tensorrt]'")
    pytest.importorskip("torch")
    paths = [str(Path(__file__).parents[2]), *sys.path]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr


def test_declaring_needs_neither_torch_nor_triton() -> None:
    code = "import sys, my_operators; print([m for m in ('torch', 'triton', 'onnxscript') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_interpreter_knows_functions() -> None:
    """A graph with a function and no caches, step by step."""
    graph = ll.optimize(small_graph(PATTERN, c=np.array(0.5, np.float32)), passes=[InsertClippedSilu])
    found = Interpreter(graph, 1, 1).step({"x": X})
    np.testing.assert_allclose(found, clipped_silu(X, limit=0.5), rtol=1e-5)
