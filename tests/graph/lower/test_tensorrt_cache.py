"""Quantized KV pools in TensorRT engines: what is lowered, what is refused, and what the kernels make of what they are handed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

import steps
from attention_forms import FORMS, LARGE, PLAN, VOCAB, form, quantized, reference, worst
from fake_driver import installed
from fake_tensorrt import FakeBuilder, FakeLibrary
from lowered import Execution
from steps import Plan

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.graph.graph import Graph
from llmlab.graph.interpret import Interpreter
from llmlab.graph.lower.tensorrt import lower
from llmlab.kernels.binaries import KernelSet
from llmlab.quant.kv_scales import CACHES
from llmlab.runtime.backends.tensorrt.check import check_program, check_tables
from llmlab.runtime.backends.tensorrt.memory import block_bytes
from llmlab.runtime.program import Attend, Program

FORM = {"rotary": 16, "window": 9, "sinks": True}


@pytest.mark.parametrize(
    ("cache", "per", "options", "tolerance"),
    [
        ("int8", "head", {}, 1e-5),
        ("int8", "tensor", {}, 1e-5),
        ("fp8", "head", {}, 1e-5),
        ("int8", "head", {"dialect": 17, "weak_type": "float16"}, 2e-2),  # rows in half precision: some round elsewhere
    ],
)
def test_parts_compute_what_the_graph_does(cache: str, per: str, options: dict[str, Any], tolerance: float) -> None:
    graph = quantized(FORM, cache, per)
    lowered = lower(graph, **options)
    (attend,) = (part for part in lowered.parts if not hasattr(part, "graph"))
    assert {"k_scale", "v_scale"} < set(attend.tables)
    execution = Execution(lowered, 24, 4, pools=CACHES[cache])
    tables = steps.paged_tables(PLAN, 4, 24)
    feeds = [steps.feeds(b) for b, _ in steps.batches(PLAN, VOCAB, tables, steps.all_rows)]
    assert worst([execution.step(f) for f in feeds], reference(graph)) < tolerance
    assert worst(reference(form(FORM)), reference(graph)) > 2e-2, "rounding is seen"


def test_plugin_nodes_get_their_scales_last() -> None:
    graph = ll.convert(quantized(FORM, "int8", "head"), "float16")
    assert (graph.activations, graph.kv_layers()[0].dtype) == ("float16", np.int8)
    (part,) = lower(graph, hosting="plugin", block_size=16).parts
    (node,) = (n for n in part.graph.surgeon.nodes if n.op == "PagedAttention")  # type: ignore[union-attr]
    assert node.attrs["quantized"] == 1 and [t.dtype for t in node.inputs[-2:]] == [np.float32] * 2
    assert [t.name for t in node.inputs[-2:]] == ["kv_cache.0.k_scale", "kv_cache.0.v_scale"]


@pytest.mark.parametrize(
    ("cache", "per", "options", "message"),
    [
        ("int4", "head", {}, "a KV cache in int4 is for onnxruntime, for TensorRT there are int8 and float8_e4m3fn"),
        (
            "int8",
            "channel",
            {},
            "m/PagedAttention: its KV cache has a scale for each channel, which is for onnxruntime",
        ),
        ("int8", "head", {"hosting": "native", "block_size": 64}, "native hosting has no KV cache in int8"),
    ],
)
def test_what_the_kernels_lack_is_refused(cache: str, per: str, options: dict[str, Any], message: str) -> None:
    graph = quantized(FORM, cache, per)
    with pytest.raises(InputError, match=message):
        lower(ll.convert(graph, "float16") if options else graph, **options)


# First prompts, a chunk, a whole block beside a decode; then decodes.
EMULATED = Plan(((9, 1, 1), (0, 16, 1), (1, 3, 1)))
BLOCKS = 8


def engine(graph: Graph, folder: Path, patch: pytest.MonkeyPatch) -> tuple[ll.Engine, Any]:
    """A piecewise engine, TensorRT played by ONNX Runtime, and the GPU on which Triton's interpreter runs its kernels."""
    from emulated_gpu import EmulatedGpu

    class Emulated(EmulatedGpu):
        @property
        def enqueue(self) -> Any:
            return self._do

    sources: list[Any] = []

    def compile_kernels(given: Any, architectures: Any, progress: Any = None) -> KernelSet:
        sources.extend(given)
        return EmulatedGpu(sources).kernels

    gpu = SimpleNamespace(name="Fake GPU", compute_capability=(9, 0), cuda=(13, 0))
    library = FakeLibrary(None)  # type: ignore[arg-type]
    patch.setattr("llmlab.build_tensorrt.resolve", lambda kind: library)
    patch.setattr("llmlab.build_tensorrt.visible_gpu", lambda: gpu)
    patch.setattr("llmlab.build_tensorrt.PlanBuilder", FakeBuilder)
    patch.setattr("llmlab.program_tensorrt.compile_kernels", compile_kernels)
    patch.setattr("llmlab.runtime.backends.tensorrt.open.resolve", lambda kind: library)
    config = ll.BuildConfig(block_size=16, max_batch=4, max_tokens_per_step=40, compute_capabilities=((9, 0),))
    made = ll.build(graph, folder, target="tensorrt", config=config)
    driver = Emulated(sources)
    object.__setattr__(library, "driver", driver)
    return made, driver


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install 'llmlab[tensorrt]'")
def test_an_engine_with_an_int8_pool_equals_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quantized((FORMS | LARGE)["rope"] | {"dim": 32}, "int8", "head")
    tables = steps.paged_tables(EMULATED, 16, BLOCKS)
    full = np.full((len(tables), 4), -1, np.int32)
    full[:, : tables.shape[1]] = tables[:, :4]
    batches = [b for b, _ in steps.batches(EMULATED, VOCAB, full, steps.all_rows)]
    interpreter = Interpreter(graph, BLOCKS, 16)
    expected = [interpreter.step(steps.feeds(b)) for b in batches]
    made, driver = engine(graph, tmp_path / "e", monkeypatch)
    kv = made.manifest.kv
    assert (made.manifest.precision, kv.dtype, kv.bytes_per_token) == ("float16", "int8", 2 * 2 * 32)
    assert block_bytes(kv) == 16 * kv.bytes_per_token
    with installed(driver):
        backend = made.backend(max_num_seqs=4, kv_blocks=BLOCKS)
        found = [backend.execute(b).copy() for b in batches]
        assert worst(found, expected) < 1e-2
        assert backend.executor.graphs, "the last step was captured"
        wrong = backend.execute(steps.off_by_one_length(batches[-1]))
        assert steps.worst_error(wrong, expected[-1]) > 5e-2
        backend.close()


def altered(program: Program, tables: dict[str, str]) -> Program:
    given = [Attend(**{**vars(s), "tables": tables}) if isinstance(s, Attend) else s for s in program.steps]
    return Program(program.tensors, tuple(given), program.weights)


def test_a_program_without_its_scales_is_not_believed() -> None:
    from llmlab.program_tensorrt import to_program

    lowered = lower(quantized({}, "int8", "head"))
    program, kv = to_program(lowered), SimpleNamespace(dtype="int8", layers=((2, 16),))
    manifest: Any = SimpleNamespace(kv=kv, files={s.plan: {} for s in program.steps if not isinstance(s, Attend)})
    check_program(program, manifest)
    check_tables(program, lowered.tables, 64)
    (attend,) = (s for s in program.steps if isinstance(s, Attend))
    for tables in ({}, {"k_scale": attend.tables["k_scale"]}):
        with pytest.raises((ValueError, EngineError), match="has tables"):
            check_program(altered(program, tables), manifest)
    manifest.kv.dtype = "float16"
    with pytest.raises(ValueError, match="has tables k_scale, v_scale"):
        check_program(program, manifest)
    for bad in (np.ones(3, np.float32), np.zeros(2, np.float32)):
        with pytest.raises(ValueError, match="reads k_scale from"):
            check_tables(program, dict(lowered.tables) | {attend.tables["k_scale"]: bad}, 64)
