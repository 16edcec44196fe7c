"""Pieces run in turn compute what the whole graph computes, wherever it is cut."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import steps
import tiny
from conftest import Store
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from rich.console import Console
from small_graphs import CONFIG, ops, padded_tokens, rows, run, small_graph
from steps import RAGGED

from llmlab.errors import GraphError, InputError
from llmlab.graph.cut import cut
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import KERNELS, Interpreter
from llmlab.graph.pieces import Cut, Feeds, Piece

CHAIN = """m (float[N,4] x) => (float[N,4] y) {
    t = Transpose<perm=[1,0]>(w)
    a = MatMul(x, t)
    b = Relu(a)
    c = Neg(b)
    d = MatMul(c, t)
    e = Add(d, a)
    y = Neg(e)
}"""
W = {"w": rows(4, 4)}


def is_op(*names: str) -> Callable[[gs.Node], bool]:
    return lambda node: node.op in names


def in_ort(piece: Piece, feeds: Feeds) -> list[np.ndarray]:
    return run(piece.graph, feeds)


def evaluated(piece: Piece, feeds: Feeds) -> list[np.ndarray]:
    return ReferenceEvaluator(piece.graph.to_onnx(), new_ops=list(KERNELS)).run(None, dict(feeds))


def pieces_of(result: Cut) -> list[list[str]]:
    return [[node.op for node in piece.graph.surgeon.nodes] for piece in result.pieces]


def same_in_pieces(graph: Graph, at: Callable[[gs.Node], bool], feeds: dict[str, np.ndarray]) -> Cut:
    result = cut(graph, at)
    before = {n.name: (n.op, len(n.inputs)) for n in graph.surgeon.nodes}
    for found, expected in zip(result.run(feeds, in_ort), run(graph, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert {n.name: (n.op, len(n.inputs)) for n in graph.surgeon.nodes} == before
    return result


def test_a_chain_is_cut_in_order() -> None:
    graph = small_graph(CHAIN, **W)
    result = same_in_pieces(graph, is_op("Neg"), {"x": rows(3, 4)})
    assert pieces_of(result) == [["Transpose", "MatMul", "Relu"], ["Neg"], ["Transpose", "MatMul", "Add"], ["Neg"]]
    assert [p.marked for p in result.pieces] == [False, True, False, True]
    assert [(c.name, c.dtype, c.shape, c.made_by, c.read_by) for c in result.crossings] == [
        ("a", "float32", ["N", 4], 0, (2,)),
        ("b", "float32", ["N", 4], 0, (1,)),
        ("c", "float32", ["N", 4], 1, (2,)),
        ("e", "float32", ["N", 4], 2, (3,)),
    ]
    shared = [p.graph.surgeon.tensors()["w"]._values for p in (result.pieces[0], result.pieces[2])]
    assert shared[0] is shared[1] is graph.surgeon.tensors()["w"]._values, "weights are shared, not copied"


def test_what_matches_nothing_is_one_piece() -> None:
    graph = small_graph(CHAIN, **W)
    result = same_in_pieces(graph, lambda node: False, {"x": rows(3, 4)})
    assert len(result.pieces) == 1 and not result.crossings and ops(result.pieces[0].graph) == ops(graph)


def test_what_matches_everything_is_a_piece_a_node() -> None:
    result = same_in_pieces(small_graph(CHAIN, **W), lambda node: True, {"x": rows(3, 4)})
    assert pieces_of(result) == [["Transpose"], ["MatMul"], ["Relu"], ["Neg"], ["MatMul"], ["Add"], ["Neg"]]


def test_branches_around_a_cut_run_as_late_as_they_can() -> None:
    """The branch that only the end needs does not cross; independent chosen nodes share a stage."""
    text = """m (float[N,4] x) => (float[N,4] y) {
        side = Neg(x) a = Relu(x) b = Sigmoid(x) p = Relu(b) s = Add(a, p) y = Mul(s, side) }"""
    result = same_in_pieces(small_graph(text), is_op("Relu"), {"x": rows(3, 4)})
    assert pieces_of(result) == [["Sigmoid"], ["Relu"], ["Relu"], ["Neg", "Add", "Mul"]]
    assert [c.name for c in result.crossings] == ["b", "a", "p"]


def test_inputs_and_constants_that_are_outputs_pass_through() -> None:
    graph = small_graph("m (float[N,4] x) => (float[N,4] y) { y = Neg(x) }")
    constant = gs.Constant("c", rows(2, 2))
    graph.surgeon.outputs += [graph.surgeon.inputs[0], constant]
    feeds = {"x": rows(3, 4)}
    found = cut(graph, is_op("Neg")).run(feeds, in_ort)
    for a, b in zip(found, [-feeds["x"], feeds["x"], rows(2, 2)], strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_output_that_depends_on_constants_alone_is_made_once() -> None:
    text = """m (float[N,4] x) => (float[N,4] y, float[4,4] t) {
        t = Transpose<perm=[1,0]>(w) a = MatMul(x, t) b = Neg(a) y = MatMul(b, t) }"""
    result = same_in_pieces(small_graph(text, **W), is_op("Neg"), {"x": rows(3, 4)})
    assert [p.outputs for p in result.pieces] == [("a",), ("b",), ("t", "y")]


def test_random_numbers_are_drawn_once() -> None:
    text = """m (float[N,4] x) => (float[N,4] y) {
        r = RandomNormal<shape=[4]>() a = Add(x, r) b = Neg(a) y = Add(b, r) }"""
    graph = small_graph(text)
    (found,) = cut(graph, is_op("Neg")).run({"x": rows(3, 4)}, evaluated)
    np.testing.assert_allclose(found, -rows(3, 4), atol=1e-5)


def test_subgraphs_read_what_they_capture() -> None:
    text = """m (float[N,4] x, bool c) => (float[N,4] y) {
        a = Relu(x) b = Neg(a)
        y = If(c) <then_branch = g () => (float[N,4] t) { t = Add(a, b) }, else_branch = h () => (float[N,4] e) { e = Mul(b, b) }>
    }"""
    graph = small_graph(text)
    for flag in (True, False):
        result = same_in_pieces(graph, is_op("Neg"), {"x": rows(3, 4), "c": np.array(flag)})
    assert [p.inputs for p in result.pieces] == [("x",), ("a",), ("c", "a", "b")]


@st.composite
def random_graphs(draw: Any) -> tuple[Graph, set[str]]:
    """A DAG of one- and two-operand nodes, some over constants alone, and the names of the nodes to cut at."""
    x = [gs.Variable(f"x{i}", np.dtype(np.float32), [3, 4]) for i in range(draw(st.integers(1, 2)))]
    w = [gs.Constant(f"w{i}", rows(3, 4, seed=i)) for i in range(2)]
    tensors: list[gs.Tensor] = [*x, *w]
    nodes = []
    for i in range(draw(st.integers(1, 14))):
        op = draw(st.sampled_from(["Add", "Sub", "Mul", "Neg", "Tanh", "Identity", "Constant"]))
        count = {"Add": 2, "Sub": 2, "Mul": 2, "Constant": 0}.get(op, 1)
        inputs = [tensors[draw(st.integers(0, len(tensors) - 1))] for _ in range(count)]
        out = gs.Variable(f"t{i}", np.dtype(np.float32), [3, 4])
        attrs = {} if count else {"value": gs.Constant(f"v{i}", rows(3, 4, seed=9 + i))}
        nodes.append(gs.Node(op, f"n{i}", attrs, inputs, [out]))
        tensors.append(out)
    made = tensors[len(x) + len(w) :]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique_by=id))
    order = draw(st.permutations(nodes))
    surgeon = gs.Graph(list(order), x, outputs, opset=23)
    return Graph(surgeon, CONFIG), set(draw(st.lists(st.sampled_from([n.name for n in nodes]))))


@settings(max_examples=60, deadline=None)
@given(random_graphs())
def test_any_graph_cut_anywhere(case: tuple[Graph, set[str]]) -> None:
    graph, names = case
    feeds = {t.name: rows(3, 4, seed=20 + i) for i, t in enumerate(graph.surgeon.inputs)}
    whole = graph.copy()
    whole.surgeon.toposort()
    result = cut(graph, lambda node: node.name in names)
    found, expected = result.run(feeds, evaluated), ReferenceEvaluator(whole.to_onnx()).run(None, feeds)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {p.name for p in result.pieces if p.marked} == names
    for piece in result.pieces:
        marked = [n for n in piece.graph.surgeon.nodes if n.name in names]
        assert len(marked) == piece.marked
    for before, after in zip(result.pieces, result.pieces[1:], strict=False):
        assert before.marked or after.marked, "two runs side by side are one"


def test_the_plain_graph_of_a_model_at_its_attention(store: Store) -> None:
    graph = store.plain("llama")
    feeds = padded_tokens(2, 9)
    result = same_in_pieces(graph, is_op("Attention"), feeds)
    assert sum(p.marked for p in result.pieces) == 2
    spoiled = [p if p.marked else replace(p, graph=_tripled(p.graph)) for p in result.pieces]
    (wrong,) = replace(result, pieces=tuple(spoiled)).run(feeds, in_ort)
    assert steps.worst_error(wrong, run(graph, feeds)[0]) > 1e-2, "a piece that is wrong is seen"


def _tripled(graph: Graph) -> Graph:
    """Every weight matrix of a piece three times as large."""
    result = graph.copy()
    for tensor in result.surgeon.tensors().values():
        if isinstance(tensor, gs.Constant) and len(tensor.shape) == 2 and tensor.dtype == np.float32:
            tensor.values = np.asarray(tensor.values) * 3
    return result


def serving_steps(graph: Graph, swap: bool = False) -> list[np.ndarray]:
    """Logits of RAGGED's steps, piece by piece at PagedAttention; with `swap`, the first layer's queries and keys of
    one piece go to the other's."""
    result = cut(graph, is_op("PagedAttention"))
    runners = [ReferenceEvaluator(p.graph.to_onnx(), new_ops=list(KERNELS)) for p in result.pieces]
    caches = Interpreter(graph, num_blocks=48, block_size=4).caches

    def execute(piece: Piece, feeds: Feeds) -> list[np.ndarray]:
        feeds = dict(feeds)
        if swap and piece.marked:
            feeds[piece.inputs[0]] = feeds[piece.inputs[0]][::-1]
        return runners[piece.index].run(None, feeds)

    logits = []
    for batch, _ in steps.batches(RAGGED, tiny.VOCAB, steps.paged_tables(RAGGED, 4, 48), steps.all_rows):
        first, *updated = result.run({**steps.feeds(batch), **caches}, execute)
        caches = dict(zip(caches, updated, strict=True))
        logits.append(first)
    return logits


def test_the_serving_graph_of_a_model_at_its_attention(store: Store) -> None:
    graph = store.serving("llama")
    interpreter = Interpreter(graph, num_blocks=48, block_size=4)
    plan = steps.batches(RAGGED, tiny.VOCAB, steps.paged_tables(RAGGED, 4, 48), steps.all_rows)
    expected = [interpreter.step(steps.feeds(batch)) for batch, _ in plan]
    found = serving_steps(graph)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    swapped = serving_steps(graph, swap=True)
    assert max(steps.worst_error(a, b) for a, b in zip(swapped, expected, strict=True)) > 1e-2


def test_layers_are_recognised_as_identical() -> None:
    layers = "".join(
        f"t{i} = Transpose<perm=[1,0]>(w{i}) a{i} = MatMul(x{i}, t{i}) b{i} = Softmax(a{i}) x{i + 1} = Add(x{i}, b{i})\n"
        for i in range(4)
    )
    weights = {f"w{i}": rows(4, 4, seed=i) for i in range(4)}
    text = f"m (float[N,4] x0) => (float[N,4] y) {{ {layers} y = Neg(x4) }}"
    result = same_in_pieces(small_graph(text, **weights), is_op("Softmax"), {"x0": rows(3, 4)})
    runs = [p for p in result.pieces if not p.marked]
    assert len({p.key for p in result.pieces if p.marked}) == 1
    keys = [p.key for p in runs]
    assert len(keys) == 5 and keys[1] == keys[2] == keys[3] and len({*keys}) == 3
    assert [[n.rstrip("01234") for n in p.inputs] for p in runs[1:4]] == [["x", "b"]] * 3, "they correspond in order"


@pytest.mark.parametrize(
    "other",
    [
        "y = Mul(x, c)",
        "y = Add(x, x)",
        "t = Add(x, c) y = Neg(t)",
        "k = Constant<value_float=2.0>() y = Add(x, k)",
        "y = Add(c, x)",
        "y = Add(x, longer)",
    ],
)
def test_what_is_different_has_another_key(other: str) -> None:
    frame = "m (float[N,4] x) => (float[N,4] y) {{ {} }}"
    given = {"c": rows(4, seed=1), "longer": rows(1, 4)}

    def key(line: str, **more: np.ndarray) -> str:
        return cut(small_graph(frame.format(line), **{**given, **more}), lambda node: False).pieces[0].key

    assert key("y = Add(x, c)") == key("y = Add(x, c)", c=rows(4, seed=2)) != key(other)


def test_scalars_and_sizes_are_structure() -> None:
    frame = "m (float[N,4] x) => (float[N,M] y) { y = Reshape(x, n) }"
    keys = {cut(small_graph(frame, n=np.array(n)), lambda node: False).pieces[0].key for n in ([-1, 4], [-1, 2])}
    assert len(keys) == 2


def fails(node: gs.Node) -> bool:
    raise KeyError("the\nreason")


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("PagedAttention", "at is a str; expected a function from a node to True or False"),
        (lambda node: None, "the predicate gives None for m.t/Transpose; expected True or False"),
        (lambda node: 1, "the predicate gives 1 for m.t/Transpose; expected True or False"),
        (fails, "the predicate fails at m.t/Transpose: KeyError: 'the\\nreason'"),
    ],
)
def test_predicates_that_can_not_be_used(at: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        cut(small_graph(CHAIN, **W), at)
    assert str(caught.value) == reason


def test_graphs_that_can_not_be_cut() -> None:
    with pytest.raises(InputError, match="expected a Graph, got str"):
        cut("tinychat", lambda node: True)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="no nodes"):
        cut(Graph(gs.Graph(opset=23), CONFIG), lambda node: True)
    graph = small_graph(CHAIN, **W)
    graph.surgeon.tensors()["b"].dtype = None
    with pytest.raises(GraphError, match="b crosses from one piece to another, and its type isn't known"):
        cut(graph, is_op("Neg"))


def test_it_shows_itself(store: Store) -> None:
    result = cut(store.serving("llama"), is_op("PagedAttention"))
    page = result._repr_mimebundle_()
    assert page["text/plain"] == repr(result) == "Cut(5 pieces, 2 at chosen nodes, 4 different; 10 tensors cross)"
    assert page["text/html"].count("<tr>") == 6 and "model.layers.1.self_attn/PagedAttention" in page["text/html"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "pieces 1, 3: model.layers.0.self_attn/PagedAttention\n" in shown
    words = set(shown.split())
    for piece in (result.pieces[i] for i in (0, 1, 2, 4)):  # one of each kind: no name is broken
        assert {*piece.inputs, *piece.outputs} <= words
    data = json.loads(json.dumps(result.to_dict()))
    assert [p["marked"] for p in data["pieces"]] == [False, True, False, True, False]
    assert data["outputs"] == ["logits", "kv_cache.0.updated", "kv_cache.1.updated"]
    assert all(c["made_by"] < min(c["read_by"]) for c in data["crossings"])


def test_a_cut_is_its_pieces_and_a_piece_shows_itself(store: Store) -> None:
    result = cut(store.serving("llama"), is_op("PagedAttention"))
    assert len(result) == 5 and tuple(result) == result.pieces
    page = result.pieces[1]._repr_mimebundle_()["text/html"]
    assert "model.layers.0.self_attn/PagedAttention</b>, a chosen node" in page and "<td>block_table</td>" in page
    evil = replace(result.pieces[2], name="<script>")._repr_mimebundle_()["text/html"]
    assert "<script" not in evil and "&lt;script&gt;" in evil and "chosen" not in evil


def test_a_piece_is_saved_and_opened(store: Store, tmp_path: Any) -> None:
    piece = cut(store.serving("llama"), is_op("PagedAttention")).pieces[2]
    back = Graph.load(piece.graph.save(tmp_path / "piece"))
    assert back.op_counts() == piece.graph.op_counts() and back.config == piece.graph.config
    feeds = {t.name: rows(5, t.shape[1], seed=i) for i, t in enumerate(piece.graph.surgeon.inputs)}
    again = replace(piece, graph=back)
    for a, b in zip(evaluated(again, feeds), evaluated(piece, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
