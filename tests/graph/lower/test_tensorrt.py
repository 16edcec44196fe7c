"""What is lowered for TensorRT computes what the serving graph does, part by part, on ragged and chunked steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import steps
import tiny
from conftest import Store
from families import FAMILIES
from lowered import Execution
from my_operators import clipped_silu
from steps import RAGGED, worst_error

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.edit import Editor, scope, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Attend, Dense, Lowered, Tensor, View

BLOCKS, BLOCK_SIZE = 48, 4
dialects = pytest.mark.parametrize("dialect", [17, 23])


class Truth:
    """What the interpreter says of the serving graph in every step of RAGGED."""

    def __init__(self, graph: Graph) -> None:
        tables = steps.paged_tables(RAGGED, BLOCK_SIZE, BLOCKS)
        self._feeds = [steps.feeds(b) for b, _ in steps.batches(RAGGED, tiny.VOCAB, tables, steps.some_rows)]
        interpreter = Interpreter(graph, BLOCKS, BLOCK_SIZE)
        self._logits = [interpreter.step(feeds) for feeds in self._feeds]

    def error(self, lowered: Lowered) -> float:
        execution = Execution(lowered, BLOCKS, BLOCK_SIZE)
        pairs = zip(self._feeds, self._logits, strict=True)
        return max(worst_error(execution.step(feeds), logits) for feeds, logits in pairs)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def case(request: pytest.FixtureRequest, store: Store) -> tuple[Graph, Truth]:
    """An untied head; a tied one and biases; norms between the product and attention."""
    graph = store.serving(request.param)
    return graph, Truth(graph)


@dialects
def test_parts_compute_what_the_graph_does(case: tuple[Graph, Truth], dialect: int) -> None:
    graph, truth = case
    lowered = lower(graph, dialect=dialect)
    assert [type(p) for p in lowered.parts] == [Dense, Attend, Dense, Attend, Dense]
    assert truth.error(lowered) < 1e-5


@dialects
def test_in_float16(case: tuple[Graph, Truth], dialect: int) -> None:
    graph, truth = case
    assert 1e-5 < truth.error(lower(ll.convert(graph, "float16"), dialect=dialect)) < 2e-2


def test_under_weak_typing(case: tuple[Graph, Truth]) -> None:
    """The parts stay in float32, what they hand each other is rounded to float16."""
    graph, truth = case
    lowered = lower(graph, dialect=17, weak_type="float16")
    assert 1e-5 < truth.error(lowered) < 2e-2
    assert {t.dtype for n, t in lowered.tensors.items() if n != "logits"} == {"float16"}
    dense = [p for p in lowered.parts if isinstance(p, Dense)]
    assert not any("Cast" in p.graph.op_counts() for p in dense)
    kept = {n.op for p in dense for n in p.graph.surgeon.nodes if n.name in p.keep_fp32}
    assert kept == {"Mul", "ReduceMean", "Add", "Sqrt", "Div"}, "the norms, and nothing else"


def test_what_parts_hand_each_other(store: Store) -> None:
    lowered = lower(store.serving("llama"))
    first, attend, second, _, last = lowered.parts
    assert isinstance(first, Dense) and isinstance(second, Dense) and isinstance(last, Dense)
    assert isinstance(attend, Attend)
    assert first.inputs == ("input_ids",) and last.outputs == ("logits",) and "logits_index" in last.inputs
    assert (attend.layer, attend.num_heads, attend.kv_heads, attend.head_dim) == (0, 4, 2, 16)
    packed = attend.q.tensor
    assert (attend.q, attend.k, attend.v) == (View(packed, 0), View(packed, 64), View(packed, 96))
    assert packed in first.outputs and attend.out in second.inputs
    assert lowered.tensors[packed] == Tensor("float32", 128, "T") and lowered.tensors[attend.out].width == 64
    assert lowered.tensors["logits"] == Tensor("float32", tiny.VOCAB, "N")
    assert set(attend.tables) == {"cos", "sin"}
    assert {a.dtype.name for a in lowered.tables.values()} == {"float32"} and len(lowered.tables) == 2
    assert {t.dtype for t in first.graph.surgeon.inputs} == {np.dtype(np.int32)}
    assert next(t.dtype for t in last.graph.surgeon.inputs if t.name == "logits_index") == np.int32


def test_norms_between_product_and_attention_stay(store: Store) -> None:
    """q and k are tensors of their own then, and v is a view of the product."""
    attend = lower(store.serving("qwen3")).parts[1]
    assert isinstance(attend, Attend)
    assert len({attend.q.tensor, attend.k.tensor, attend.v.tensor}) == 3
    assert (attend.q.offset, attend.k.offset, attend.v.offset) == (0, 0, 160)


@pytest.mark.slow
def test_layers_that_are_alike_share_a_key(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "c", {**tiny.MODELS["llama"], "num_hidden_layers": 4})
    graph = ll.optimize(ll.export(tmp_path / "c"))
    keys = [p.key for p in lower(graph, dialect=17, weak_type="float16").parts if isinstance(p, Dense)]
    assert len(keys) == 5 and len(set(keys)) == 3 and len(set(keys[1:4])) == 1


def test_a_wrong_view_would_be_seen(store: Store) -> None:
    graph = store.serving("llama")
    lowered = lower(graph)
    spoiled = [
        replace(p, k=View(p.k.tensor, p.k.offset + 16)) if isinstance(p, Attend) and p.layer == 1 else p
        for p in lowered.parts
    ]
    assert Truth(graph).error(replace(lowered, parts=tuple(spoiled))) > 0.01


@dialects
def test_a_lost_norm_would_be_seen(store: Store, dialect: int) -> None:
    graph = store.serving("llama")
    spoiled = graph.copy()
    norm = next(n for n in spoiled.surgeon.nodes if n.op == "RMSNormalization" and "layers.1" in n.name)
    norm.op, norm.inputs = "Identity", norm.inputs[:1]
    norm.attrs.clear()
    assert Truth(graph).error(lower(spoiled, dialect=dialect)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str) -> None:
    model = tiny.make_model(FAMILIES[name].config)
    model.save_pretrained(tmp_path)
    graph = ll.optimize(ll.export(tmp_path, max_seq_len=FAMILIES[name].max_seq_len))
    truth, half = Truth(graph), ll.convert(graph, "float16")
    for dialect in (17, 23):
        assert truth.error(lower(graph, dialect=dialect)) < 1e-5
        assert truth.error(lower(half, dialect=dialect)) < 2e-2
    assert truth.error(lower(graph, dialect=17, weak_type="float16")) < 2e-2


def clipped(graph: Graph) -> Graph:
    """With a declared operator behind every gated product: one that no target knows."""
    result = graph.copy()
    edit = Editor(result)
    for node in [n for n in result.surgeon.nodes if n.op == "GatedActivation"]:
        readers = list(node.outputs[0].outputs)
        (made,) = clipped_silu.add(edit, scope(node), node.outputs, limit=0.3)
        edit.replace(node.outputs[0], made, only=readers)
    sort_nodes(result.surgeon)
    return result


@pytest.mark.parametrize(("dialect", "weak_type", "most"), [(17, None, 1e-5), (23, None, 1e-5), (17, "float16", 2e-2)])
def test_declared_operators_run_by_their_bodies(store: Store, dialect: int, weak_type: str | None, most: float) -> None:
    graph = store.serving("llama")
    custom = clipped(graph)
    lowered = lower(custom, dialect=dialect, weak_type=weak_type)
    assert all(not p.graph.surgeon.functions for p in lowered.parts if isinstance(p, Dense))
    assert Truth(custom).error(lowered) < most
    assert Truth(graph).error(lowered) > 0.05
    half = ll.convert(custom, "float16")
    assert Truth(custom).error(lower(half, dialect=dialect)) < 2e-2


def test_what_cannot_be_asked_for(store: Store) -> None:
    graph = store.serving("llama")
    half = ll.convert(graph, "float16")
    for message, given, options in (
        ("expected a serving graph", store.plain("llama"), {}),
        ("hosting is 'whole'; available: piecewise, plugin, native", graph, {"hosting": "whole"}),
        ("dialect is 16, expected an ONNX opset from 17 to 23", graph, {"dialect": 16}),
        ("weak_type is 'int8'", graph, {"weak_type": "int8"}),
        ("starts from float32, the graph is in float16", half, {"weak_type": "float16"}),
        ("native hosting is strongly typed: convert", graph, {"hosting": "native", "block_size": 64}),
        ("plugin hosting is strongly typed: convert", graph, {"hosting": "plugin", "block_size": 16}),
        ("block_size is None, expected a number of tokens", half, {"hosting": "plugin"}),
    ):
        with pytest.raises(InputError, match=message):
            lower(given, **options)
