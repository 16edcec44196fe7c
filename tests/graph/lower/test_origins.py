"""Which serving nodes a lowered node computes: every node once, and only what is computed together in one group."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from llmlab.graph.edit import Editor
from llmlab.graph.lower.onnxruntime import lower
from llmlab.graph.lower.origins import Origin, Origins, match, origins
from llmlab.graph.quantized import quantized
from llmlab.graph.reports.fold import layer_of
from llmlab.quant.quantize import quantize

F32 = np.dtype(np.float32)
INT4 = {"weights": {"dtype": "int4", "group": 16}}


def chain(*ops: str, names: str = "abcdefgh") -> list[gs.Node]:
    """x → op → op → …; tensors have the letters of `names`."""
    tensors = [gs.Variable(name, F32, [1]) for name in ("x", *names[: len(ops)])]
    return [gs.Node(op, f"{op}.{tensors[i + 1].name}", {}, [tensors[i]], [tensors[i + 1]]) for i, op in enumerate(ops)]


def covered(found: Origins) -> list[str]:
    return sorted([*found.folded, *(name for group in found.groups for name in group.nodes)])


def test_groups_end_where_both_make_the_same_tensor() -> None:
    before, after = chain("Exp", "Log", "Abs", "Neg"), chain("Fused", "Neg", names="cd")
    assert match(before, after) == (
        (Origin(("Exp.a", "Log.b", "Abs.c"), ("Fused.c",)), Origin(("Neg.d",), ("Neg.d",))),
        (),
    )


def test_a_tensor_that_took_anothers_place_is_the_same() -> None:
    before, after = chain("Exp", "Log"), chain("Two", "One", names="pq")
    assert len(match(before, after)[0]) == 1, "nothing is known: all in one"
    named = match(before, after, {"p": "p2", "p2": "a", "q": "b"})[0]
    assert named == (Origin(("Exp.a",), ("Two.p",)), Origin(("Log.b",), ("One.q",)))


def test_what_nothing_is_left_of_is_said() -> None:
    before, after = chain("Exp", "Log"), chain("Exp", "Abs", names="az")
    groups, gone = match(before, after)
    assert gone == ("Log.b",)
    assert groups[1] == Origin((), ("Abs.z",)), "what was added has no origin"


def test_constants_go_with_their_reader() -> None:
    weight = gs.Constant("w", np.ones((2, 2), np.float32))
    turned, x, out = gs.Variable("t", F32), gs.Variable("x", F32), gs.Variable("y", F32)
    before = [
        gs.Node("Transpose", "turn", {}, [weight], [turned]),
        gs.Node("MatMul", "multiply", {}, [x, turned], [out]),
    ]
    after = [
        gs.Node("Gemm", "gemm", {}, [gs.Variable("x", F32), gs.Constant("w.t", np.ones((2, 2)))], [gs.Variable("y")])
    ]
    assert match(before, after)[0] == (Origin(("turn", "multiply"), ("gemm",)),)
    other = gs.Node("MatMul", "again", {}, [gs.Variable("z", F32), turned], [gs.Variable("v", F32)])
    assert match([*before, other], [*after, gs.Node("Gemm", "g2", {}, [gs.Variable("z")], [gs.Variable("v")])])[1] == (
        "turn",
    ), "shared by two: it was computed when weights were written"


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_node_of_a_lowered_model_is_accounted_for(store, name: str) -> None:
    graph = store.serving(name)
    for given in (graph, quantize(graph, INT4)):
        lowered = lower(given, 1024, accuracy_level=4)
        found = origins(given, lowered)
        assert covered(found) == sorted(n.name for n in given.surgeon.nodes)
        assert sorted(m for g in found.groups for m in g.made) == sorted(n.name for n in lowered.surgeon.nodes)
        for group in found.groups:
            assert len({layer_of(n) for n in group.nodes if ".layers." in n}) <= 2, (
                group
            )  # a residual's sum and the next norm
        by_node = {node: group for group in found.groups for node in group.nodes}
        for node in given.surgeon.nodes:
            if node.op == "PagedAttention":
                assert any("GroupQueryAttention" in made for made in by_node[node.name].made)
            if node.op == "DequantizeLinear" and quantized(node.outputs[0]) is not None:
                assert any("MatMulNBits" in made for made in by_node[node.name].made)
        assert Origins.from_dict(found.to_dict()) == found


def test_without_the_names_of_replaced_tensors_it_is_coarse(store) -> None:
    """The control: what `Editor.replace` notes is what keeps layers apart."""
    graph = store.serving("llama")
    lowered = lower(graph, 1024)
    fine = origins(graph, lowered)
    lowered.stands_for.clear()
    coarse = origins(graph, lowered)
    assert len(coarse.groups) < len(fine.groups)
    assert covered(coarse) == covered(fine)


def test_an_editor_notes_what_it_replaces(store) -> None:
    graph = store.serving("llama").copy()
    assert graph.stands_for == {}
    edit = Editor(graph)
    old = graph.surgeon.nodes[-1].outputs[0]
    new = edit.add("Identity", "here", [old.inputs[0].inputs[0]], dtype=F32, shape=None)
    name, before = new.name, old.name
    edit.replace(old, new)
    assert graph.stands_for == {name: before} and graph.copy().stands_for == {}
