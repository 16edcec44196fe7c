from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import steps
from small_graphs import CONFIG, apply, ops, refused, rows, run, same, small_graph

from llmlab.graph.analysis.rows import mixing_node
from llmlab.graph.export import export
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.optimize import optimize
from llmlab.graph.passes.positional_tables import PositionalTables

# x [1,T,8] meets something made of `r`, the places 0, 1, … of the tokens as a row [1,T], or of `n`, how many there are.
FRAME = """m (int64[T] input_ids, int64[T] position_ids, float[T,8] x0) => (float y) {{
    batch = Constant<value_ints=[0]>()
    last = Constant<value_ints=[-1]>()
    ids = Unsqueeze(input_ids, batch)
    x = Unsqueeze(x0, batch)
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    n1 = Shape<start=1, end=2>(ids)
    n = Squeeze(n1, batch)
    r0 = Range(zero, n, one)
    r = Unsqueeze(r0, batch)
    rf = Cast<to=1>(r)
    nf = Cast<to=1>(n)
    column = Unsqueeze(rf, last)
    {}
}}"""
TABLES = {
    "temperature": ("c = Constant<value_float=0.1>() t = Mul(column, c) e = Exp(t) y = Mul(x, e)", 1),
    "learned": ("p = Gather(wpe, r) y = Add(x, p)", 0),
    "learned, two further on": ("two = Constant<value_int=2>() q = Add(r, two) p = Gather(wpe, q) y = Add(x, p)", 1),
    "learned, from a sum of ones": (
        "s = Shape(ids) o = ConstantOfShape<value = int64[1] {1}>(s) k = CumSum(o, one) q = Sub(k, one)"
        " p = Gather(wpe, q) y = Add(x, p)",
        0,
    ),
    "tokens last": ("h = Transpose<perm=[0,2,1]>(x) u = Unsqueeze(rf, batch) y = Add(h, u)", 1),
    "a head of its own": ("f = Mul(column, w8) g = Unsqueeze(f, batch) h = Unsqueeze(x, batch) y = Mul(h, g)", 1),
    "another axis before": (
        "f = Mul(column, w8) g = Transpose<perm=[0,2,1]>(f) h = Transpose<perm=[0,2,1]>(x) y = Mul(h, g)",
        1,
    ),
}
MORE = {"wpe": rows(66, 8), "w8": rows(8)}


def make(line: str) -> Graph:
    """With the shapes that torch's exporter knows and ONNX's inference doesn't: how long a Range is."""
    graph = small_graph(FRAME.format(line), **MORE)
    for tensor in graph.surgeon.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = ["T" if isinstance(d, str) else d for d in tensor.shape]
    return graph


def feeds(positions: np.ndarray) -> dict[str, np.ndarray]:
    tokens = len(positions)
    return {"input_ids": np.zeros(tokens, np.int64), "position_ids": positions, "x0": rows(tokens, 8)}


@pytest.mark.parametrize(("line", "tables"), TABLES.values(), ids=TABLES)
def test_places_become_positions(line: str, tables: int) -> None:
    before = make(line)
    after, report = apply(PositionalTables, before)
    assert report.rewrites == 1 and not report.near_misses
    assert mixing_node(before) is not None and mixing_node(after) is None
    looked_up = [n for n in after.surgeon.nodes if n.op == "Gather" and n.inputs[1].name == "position_ids"]
    own = [n for n in looked_up if isinstance(n.inputs[0], gs.Constant) and n.inputs[0].name != "wpe"]
    assert len(own) == tables and all(len(n.inputs[0].values) == CONFIG.max_position_embeddings for n in own)
    assert not {"Range", "Shape", "CumSum"} & set(ops(after))
    same(before, after, feeds(np.arange(9)))  # one sequence: its tokens' places are their positions


@pytest.mark.parametrize("line", [line for line, _ in TABLES.values()], ids=TABLES)
def test_packed_sequences_get_what_each_gets_alone(line: str) -> None:
    before = make(line)
    after, _ = apply(PositionalTables, before)
    packed = feeds(np.array([0, 1, 2, 3, 0, 1, 0]))
    (together,) = run(after, packed)
    (wrong,) = run(before, packed)
    axis = next(i for i, d in enumerate(together.shape) if d == 7)
    at = 0
    for length in (4, 2, 1):
        rows_of = slice(at, at + length)
        (alone,) = run(before, {**feeds(np.arange(length)), "x0": packed["x0"][rows_of]})
        np.testing.assert_allclose(np.take(together, range(at, at + length), axis), alone, rtol=1e-5)
        at += length
    assert np.abs(wrong - together).max() > 1e-2, "places in the step are not positions"


STAY = {
    "divided by the length": "t = Div(column, nf) y = Mul(x, t)",
    "counted from the end": "t = Sub(nf, column) y = Mul(x, t)",
}


@pytest.mark.parametrize("line", STAY.values(), ids=STAY)
def test_what_depends_on_the_length_stays(line: str) -> None:
    graph = make(line)
    assert refused(PositionalTables, graph).startswith("it depends on the sequence's length")
    assert mixing_node(graph) is not None


def test_what_is_right_already_stays() -> None:
    """Positions that the model was given, however they are used."""
    graph = make(
        "p0 = Unsqueeze(position_ids, batch) p = Gather(wpe, p0) f = Cast<to=1>(p0) u = Unsqueeze(f, last) z = Mul(p, u) y = Add(x, z)"
    )
    _, report = apply(PositionalTables, graph)
    assert report.matches == 0 and mixing_node(graph) is None


def test_a_weight_is_never_copied() -> None:
    """A learned embedding that is cut to the length by a Slice has no index to replace."""
    graph = make("p0 = Slice(wpe, batch, n1, batch) p = Unsqueeze(p0, batch) y = Add(x, p)")
    assert refused(PositionalTables, graph) == "a table of it would be a copy of wpe"


def toy() -> Any:
    """A torch module that is given no positions: it counts its tokens, twice, and looks a learned embedding up."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    class Toy(torch.nn.Module):
        config = {  # noqa: RUF012
            "model_type": "toy",
            "vocab_size": 12,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.at = torch.nn.Embedding(12, 16), torch.nn.Embedding(64, 16)
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16, bias=False) for _ in range(4))
            self.head = torch.nn.Linear(16, 12, bias=False)

        def forward(self, input_ids: Any, position_ids: Any = None) -> Any:
            batch, length = input_ids.shape
            x = self.embed(input_ids) + self.at(torch.arange(length)[None])
            count = torch.ones_like(input_ids).cumsum(1) - 1
            x = x * (1 + 0.1 * torch.log1p(count.float()))[..., None]
            q, k, v = (f(x).reshape(batch, length, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = attend(q, k, v, is_causal=True)
            return self.head(x + self.o(y.transpose(1, 2).reshape(batch, length, 16)))

    return Toy()


@pytest.mark.slow
def test_a_module_without_position_ids_is_right_over_ragged_steps() -> None:
    import torch

    module, plan = toy(), steps.Plan(((5, 1, 1), (1, 3, 1)))
    with torch.no_grad():
        expected = [module(torch.tensor(t[None]))[0].numpy() for t in plan.tokens(12)]
    interpreter = Interpreter(optimize(export(module)), num_blocks=8, block_size=4)
    for batch, rows_of in steps.batches(plan, 12, steps.paged_tables(plan, 4, 8), steps.all_rows):
        truth = np.array([expected[b][i] for b, i in rows_of])
        assert steps.worst_error(interpreter.step(steps.feeds(batch)), truth) < 1e-5
