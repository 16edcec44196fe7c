"""Factors in front of products leave the model as it is, wherever they go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import Store

from llmlab.graph.edit import Editor, constant_expression, producer, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.quant.calibrate import logits
from llmlab.quant.fold import Fold, find_fold, fold_factor
from llmlab.quant.projections import Projection, projections

DATA = [np.random.default_rng(n).integers(3, 96, n) for n in (1, 17, 40)]


def said(graph: Graph) -> np.ndarray:
    return np.concatenate(list(logits(graph, DATA)))


def sharing(graph: Graph) -> list[list[Projection]]:
    """The projections of the layers, those of one input together."""
    found: dict[int, list[Projection]] = {}
    for p in projections(graph):
        if p.layer is not None and p.role != "router" and p.node.op == "MatMul":
            found.setdefault(id(p.input), []).append(p)
    return list(found.values())


def factor_of(fold: Fold, depth: int, seed: int) -> np.ndarray:
    return fold.tied(np.random.default_rng(seed).uniform(0.2, 5, depth).astype(np.float32))


def folded(graph: Graph, chosen: str | None = None, kind: str | None = None) -> tuple[Graph, list[str]]:
    """A copy with a random factor in front of each product (or those of one role), and where they went."""
    result = graph.copy()
    edit, kinds = Editor(result), []
    for place, group in enumerate(sharing(result)):
        if chosen is not None and group[0].role != chosen:
            continue
        products = list({id(p.node): p.node for p in group}.values())
        fold = find_fold(products) if kind is None else Fold(kind, products[0])
        kinds.append(fold.kind)
        fold_factor(edit, group, factor_of(fold, group[0].shape[1], place), fold, projections(result))
    sort_nodes(result.surgeon.cleanup())
    return result, kinds


NORM_ROWS = ["norm", "rows", "norm", "rows"] * 2


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", NORM_ROWS),  # the factor of o_proj is one for the heads that share a v head
        ("llama3", NORM_ROWS),
        ("qwen2", NORM_ROWS),  # a bias of v
        ("qwen3", NORM_ROWS),
        ("mistral", NORM_ROWS),
    ],
)
def test_the_model_stays_the_same(store: Store, name: str, kinds: list[str]) -> None:
    graph = store.serving(name)
    before = said(graph)
    found, went = folded(graph)
    assert went == kinds
    assert not any(n.op == "Mul" and n.name.endswith("input") for n in found.surgeon.nodes)
    np.testing.assert_allclose(said(found), before, atol=1e-5 * np.abs(before).max() * 3)
    changed = {p.name: p.load() for p in projections(found)}
    for p in projections(graph):
        same = np.array_equal(changed[p.name], p.load())
        assert same == (p.layer is None), p.name


def test_a_mul_where_nothing_else_goes(store: Store) -> None:
    graph = store.serving("llama")
    before = said(graph)
    found, went = folded(graph, kind="mul")
    assert set(went) == {"mul"}
    muls = [n for n in found.surgeon.nodes if n.op == "Mul" and not constant_expression(n.inputs[0])]
    assert len(muls) == 8
    np.testing.assert_allclose(said(found), before, atol=3e-5 * np.abs(before).max())
    # a tensor that something else reads too keeps its values
    other = graph.copy()
    products = [sharing(other)[0][0].node]
    assert find_fold(products).kind == "norm"
    x = products[0].inputs[0]
    other.surgeon.outputs.append(Editor(other).add("Identity", "also", [x], dtype=x.dtype, shape=x.shape))
    assert find_fold(products).kind == "mul"


@pytest.mark.parametrize("role", ["q", "o", "gate", "down"])
def test_what_is_forgotten_shows(store: Store, role: str) -> None:
    """Without the other half, the division of the norm or the rows, the model is another one."""
    graph = store.serving("llama")
    before = said(graph)
    found, _ = folded(graph, role)
    np.testing.assert_allclose(said(found), before, atol=3e-5 * np.abs(before).max())
    for p in projections(found):
        if p.role == role and (mul := producer(p.weight, "Mul")) is not None:
            p.reader.inputs[p.index] = mul.inputs[0]
            break
    assert np.abs(said(found) - before).max() > 1e-2 * np.abs(before).max()


def test_channels_of_one_row_are_tied(store: Store) -> None:
    graph = store.serving("llama")  # four heads of 16 channels, two of keys and values
    [o, *_] = [g for g in sharing(graph) if g[0].role == "o"]
    fold = find_fold([o[0].node])
    numbers = np.arange(64, dtype=np.float32)
    tied = fold.tied(numbers)
    assert tied.reshape(4, 16)[0].tolist() == tied.reshape(4, 16)[1].tolist() == list(range(16, 32))
    assert replace(fold, kind="norm").tied(numbers) is numbers
