"""Graphs in half precision on ONNX Runtime: computed in float32, with the roundings of the graph, number for number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from attention_forms import FORMS, PLAN, VOCAB, form, quantized, reference
from conftest import Store
from families import FAMILIES
from steps import all_rows, batches, feeds, paged_tables, slot_tables, worst_error

import llmlab as ll
from llmlab.evaluate.costs import unfit
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.lower import onnxruntime, rounded
from llmlab.runtime.engine import Engine

SEQUENCES = len(PLAN.chunks)


def definition(graph: Graph, vocab: int) -> np.ndarray:
    interpreter, tables = Interpreter(graph, 32, 4), paged_tables(PLAN, 4, 32)
    return np.concatenate([interpreter.step(feeds(b)) for b, _ in batches(PLAN, vocab, tables, all_rows)])


def executed(engine: Engine, vocab: int) -> np.ndarray:
    backend = engine.backend(threads=1, max_num_seqs=SEQUENCES)
    steps = batches(PLAN, vocab, slot_tables(PLAN, range(SEQUENCES)), all_rows)
    found = np.concatenate([backend.execute(b).copy() for b, _ in steps])
    backend.close()
    return found


def equal(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of logits that are the same to the last bit."""
    return float((found == expected).mean())


def test_logits_are_the_definitions_to_the_last_bit(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ll.quantize(store.serving("qwen3"), "bf16")
    engine = ll.build(graph, tmp_path / "e", max_tokens_per_step=32)
    expected = definition(graph, tiny.VOCAB)
    assert equal(executed(engine, tiny.VOCAB), expected) > 0.99
    said = engine.manifest
    assert said.precision == "float32 rounded to bfloat16" and (said.kv.dtype, said.kv.rounding) == (
        "float32",
        "bfloat16",
    )
    assert said.recipe["precision"] == "bfloat16"
    assert unfit(Engine.load(engine.path).manifest) == "onnxruntime rounds to bfloat16 exactly, and computes in float32"
    # negative control: keys and values that aren't rounded
    monkeypatch.setattr("llmlab.graph.lower.onnxruntime_cache.SlotCache.rounded", lambda cache, rows: rows)
    control = ll.build(graph, tmp_path / "control", max_tokens_per_step=32)
    assert equal(executed(control, tiny.VOCAB), expected) < 0.9


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["partial", "odd head, rope", "sinks, window, softcap, rope", "alibi, odd head"])
def test_every_attention(tmp_path: Path, name: str, precision: str) -> None:
    graph = ll.convert(form(FORMS[name]), precision)
    engine = ll.build(graph, tmp_path / "e", max_tokens_per_step=32)
    expected = np.concatenate(reference(graph))
    assert equal(executed(engine, VOCAB), expected) > 0.7  # of float16 more lie at an edge between two numbers
    assert equal(np.concatenate(reference(form(FORMS[name]))), expected) < 0.1


def test_a_quantized_cache_and_quantized_weights(store: Store, tmp_path: Path) -> None:
    cached = ll.convert(quantized(FORMS["rope"], "int8", "head"), "bfloat16")
    engine = ll.build(cached, tmp_path / "cache", max_tokens_per_step=32)
    assert engine.manifest.kv.dtype == "int8" and unfit(engine.manifest)
    assert equal(executed(engine, VOCAB), np.concatenate(reference(cached))) > 0.9
    graph = ll.quantize(store.serving("llama"), "int4_rtn_g16+fp16")
    engine = ll.build(graph, tmp_path / "weights", max_tokens_per_step=32, accuracy_level=1)
    found, expected = executed(engine, tiny.VOCAB), definition(graph, tiny.VOCAB)
    assert worst_error(found, expected) < 5e-3  # the definition rounds weights once more, after their scale
    assert worst_error(definition(store.serving("llama"), tiny.VOCAB), expected) > 0.05
    lowered = onnxruntime.lower(graph, 64)
    assert sum(n.op == "MatMulNBits" for n in lowered.surgeon.nodes) == 8, "integers stay integers"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gpt_oss", "gemma2", "bloom", "phi3", "falcon"])
def test_families(tmp_path: Path, family: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "c", FAMILIES[family].config)
    wide = ll.optimize(ll.export(checkpoint, max_seq_len=FAMILIES[family].max_seq_len))
    graph = ll.convert(wide, "bfloat16")
    expected = definition(graph, tiny.VOCAB)
    found = executed(ll.build(graph, tmp_path / "e", max_tokens_per_step=32), tiny.VOCAB)
    assert np.abs(found - expected).mean() < 0.2 * np.abs(definition(wide, tiny.VOCAB) - expected).mean()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_are_the_definitions_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "c", FAMILIES[family].config)
    graph = ll.convert(ll.optimize(ll.export(checkpoint, max_seq_len=FAMILIES[family].max_seq_len)), "bfloat16")
    expected = definition(graph, tiny.VOCAB)
    assert equal(executed(ll.build(graph, tmp_path / "e", max_tokens_per_step=32), tiny.VOCAB), expected) > 0.99
    # negative control: what the experts give isn't rounded
    monkeypatch.setattr("llmlab.graph.lower.rounded._EXACT", rounded._EXACT | {"MixtureOfExperts"})
    control = ll.build(graph, tmp_path / "control", max_tokens_per_step=32)
    assert equal(executed(control, tiny.VOCAB), expected) < 0.9
