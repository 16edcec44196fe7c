"""Weights that lie otherwise than a llama's: stacked experts, either way round, and products stored [K, N]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import Store
from families import FAMILIES
from steps import Plan, all_rows, batches, feeds, paged_tables, slot_tables, worst_error

import llmlab as ll
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.lower.onnxruntime import lower
from llmlab.graph.quantized import quantized
from llmlab.quant.grid import Grid
from llmlab.quant.projections import projections

PLAN = Plan(((7, 1), (1, 4), (0, 3)))


def serving(store: Store, family: str) -> Graph:
    def make(path: Path) -> None:
        checkpoint = tiny.write_checkpoint(path.with_suffix(".family"), FAMILIES[family].config)
        ll.optimize(ll.export(checkpoint, max_seq_len=FAMILIES[family].max_seq_len)).save(path)

    return Graph.load(store.once(f"{family}.quantized.serving", make))


@pytest.mark.parametrize(
    "family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_families(store: Store, tmp_path: Path, family: str) -> None:
    graph = serving(store, family)
    wide = {p.name: p for p in projections(graph)}
    assert {p.role for p in wide.values()} <= {
        *("embedding", "head", "router", "q", "k", "v", "qkv", "o", "up", "down", "expert_up", "expert_down")
    }
    for recipe, grid in (("int8", Grid("int8")), ("int4_rtn_g16_asym", Grid("int4", 16, False))):
        given = ll.quantize(graph, recipe)
        done = [p for p in projections(given) if p.is_quantized]
        assert {p.role for p in wide.values()} - {p.role for p in done} <= {"embedding", "head", "router"}
        for p in done:
            expected = grid.quantize(wide[p.name].load())
            np.testing.assert_array_equal(p.load(), expected.dequantize(), err_msg=p.name)
            found = quantized(p.reader.inputs[p.index])
            assert found is not None and found.values._values.nbytes == p.load().size * (4 if grid.group else 8) // 8
        interpreter = Interpreter(given, 24, 4)
        tables = paged_tables(PLAN, 4, 24)
        expected_logits = [interpreter.step(feeds(b)) for b, _ in batches(PLAN, 96, tables, all_rows)]
        engine = ll.build(given, tmp_path / recipe, max_tokens_per_step=32, accuracy_level=1)
        backend = engine.backend(threads=1, max_num_seqs=3)
        steps = batches(PLAN, 96, slot_tables(PLAN, range(3)), all_rows)
        for (batch, _), expected_step in zip(steps, expected_logits, strict=True):
            assert worst_error(backend.execute(batch), expected_step) < 1e-4


def test_experts_are_written_one_by_one(store: Store) -> None:
    """Not all of them for each of them: the rounding of a stack would be repeated as often as there are experts."""
    graph = ll.quantize(serving(store, "mixtral"), "int8")
    lowered = lower(graph, 64)
    dense = [n for n in lowered.surgeon.nodes if n.op == "DequantizeLinear" and len(n.inputs[0].shape) == 3]
    assert dense, "experts are quantized where ONNX Runtime's own operator takes them whole"
