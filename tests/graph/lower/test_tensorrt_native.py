"""ONNX's own attention over linear slots computes what PagedAttention does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import steps
import tiny
from attention_forms import FORMS, PLAN, VOCAB, form
from conftest import Store
from onnx.reference import ReferenceEvaluator
from small_graphs import ops
from steps import RAGGED, Plan, worst_error

import llmlab as ll
from llmlab.errors import UnsupportedModelError
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import KERNELS, Interpreter
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Dense
from llmlab.runtime.batch import StepBatch

SLOTS, CAPACITY = 6, 64 + 31  # the longest sequence, and the longest chunk behind it


def native(graph: Graph) -> Graph:
    (part,) = lower(graph, hosting="native", block_size=CAPACITY).parts
    assert isinstance(part, Dense)
    return part.graph


def layout(batch: StepBatch) -> dict[str, np.ndarray]:
    """Where each row of the step lies, with a row for every slot: slots that have no sequence are idle."""
    counts = np.diff(batch.query_start)
    slots, longest = batch.block_table[:, 0], int(counts.max())
    unpack, write = np.zeros((SLOTS, longest), np.int32), np.zeros(SLOTS, np.int64)
    pack = np.zeros(len(batch.input_ids), np.int32)
    for slot, count, begin, length in zip(slots, counts, batch.query_start, batch.kv_len, strict=False):
        unpack[slot, :count] = np.arange(begin, begin + count)
        pack[begin : begin + count] = slot * longest + np.arange(count)
        write[slot] = length - count
    return {"unpack_index": unpack, "pack_index": pack, "write_index": write}


def error(graph: Graph, hosted: Graph, plan: Plan = RAGGED, vocab: int = tiny.VOCAB) -> float:
    """How far the hosted graph's logits are from the serving graph's, relative to the largest; worst of the plan's steps."""
    evaluator = ReferenceEvaluator(hosted.to_onnx(), new_ops=list(KERNELS))
    pasts = [t for t in hosted.surgeon.inputs if t.name.startswith("past_")]
    caches = {t.name: np.zeros((SLOTS, *t.shape[1:]), t.dtype) for t in pasts}
    interpreter = Interpreter(graph, SLOTS, CAPACITY)
    tables = steps.slot_tables(plan, [4, 0, 2, 5, 1])
    idle = dict.fromkeys(range(SLOTS), 0)
    worst = 0.0
    for batch, _ in steps.batches(plan, vocab, tables, steps.all_rows):
        feeds = steps.feeds(batch)
        where = layout(batch)
        absent = [s for s in range(SLOTS) if s not in batch.block_table[:, 0]]
        where["write_index"][absent] = [idle[s] for s in absent]
        idle |= dict(zip(batch.block_table[:, 0], batch.kv_len, strict=True))
        step = {n: feeds[n].astype(np.int32) for n in ("input_ids", "position_ids", "logits_index")}
        logits, *present = evaluator.run(None, {**step, **where, **caches})
        caches = dict(zip(caches, present, strict=True))
        worst = max(worst, worst_error(logits, interpreter.step(feeds)))
    return worst


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_slots_compute_what_blocks_do(store: Store, name: str) -> None:
    graph = store.serving(name)
    hosted = native(ll.convert(graph, "float16"))
    assert "PagedAttention" not in ops(hosted) and ops(hosted)["TensorScatter"] == 4 and ops(hosted)["Attention"] == 2
    assert error(graph, hosted) < 2e-2


NATIVE = {name: options for name, options in FORMS.items() if not options.keys() & {"softcap", "sinks"}}


@pytest.mark.parametrize("options", NATIVE.values(), ids=NATIVE)
def test_every_form_that_it_has(options: dict[str, Any]) -> None:
    graph = form(options)
    assert error(graph, native(ll.convert(graph, "float16")), PLAN, VOCAB) < 5e-3


@pytest.mark.parametrize("taken", ["rotary", "interleaved", "window", "alibi"])
def test_every_part_of_a_form_matters(taken: str) -> None:
    full: dict[str, Any] = {"rotary": 8, "interleaved": 1, "window": 3, "alibi": True}
    less = form({name: value for name, value in full.items() if name != taken})
    assert error(form(full), native(ll.convert(less, "float16")), PLAN, VOCAB) > 0.05


def test_a_mask_that_is_off_by_one_would_be_seen(store: Store) -> None:
    graph = store.serving("mistral")
    hosted = native(ll.convert(graph, "float16"))
    bound = next(n for n in hosted.surgeon.nodes if n.op == "Greater").inputs[1]
    bound.values = bound.values - 1
    assert error(graph, hosted) > 0.05


def with_input(graph: Graph, index: int, values: np.ndarray) -> Graph:
    """A copy whose attention reads another constant as input `index`."""
    result = graph.copy()
    for node in (n for n in result.surgeon.nodes if n.op == "PagedAttention"):
        kept = [*node.inputs[:index], *(gs.Variable.empty() for _ in range(index - len(node.inputs)))]
        node.inputs = [*kept, gs.Constant(f"{node.name}.{index}", values)]
    return result


def test_alibi_is_in_the_mask(store: Store) -> None:
    graph = with_input(store.serving("llama"), 10, np.array([0.5, 0.25, 0.1, 0.05], np.float32))
    hosted = native(ll.convert(graph, "float16"))
    assert error(graph, hosted) < 2e-2
    first, second = (n.inputs[3] for n in hosted.surgeon.nodes if n.op == "Attention")
    assert first is second, "layers with the same slopes share a mask"
    assert error(graph, native(ll.convert(store.serving("llama"), "float16"))) > 0.05


def test_what_native_attention_lacks_is_refused_by_name(store: Store) -> None:
    graph = ll.convert(store.serving("llama"), "float16")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn/PagedAttention: sinks, which native"):
        native(with_input(graph, 11, np.zeros(4, np.float32)))
    capped = graph.copy()
    for node in (n for n in capped.surgeon.nodes if n.op == "PagedAttention"):
        node.attrs["softcap"] = 2.0
    with pytest.raises(UnsupportedModelError, match="PagedAttention: a softcap, which native"):
        native(capped)
