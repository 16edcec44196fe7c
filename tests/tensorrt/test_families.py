"""Engines with the plugin for models of every family, in every precision, for GPUs that aren't here: what TensorRT made of them.

They are built and looked into, not run: no GPU that TensorRT-RTX builds for is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
import tiny
from families import FAMILIES

pytest.importorskip("tensorrt_rtx")

from plugin_engines import (
    GPUS,
    PRECISIONS,
    Built,
    build,
    check_engine,
    check_plugins,
    check_products,
    check_profiles,
    compile_graph,
    lowered,
)
from quantised import RECIPES, quantise

import llmlab as ll
from llmlab.errors import EngineError
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.lower.tensorrt import lower

# Every precision and every GPU, over models that differ in heads, windows, biases and norms.
QUICK = [
    ("tinychat", "float16", (8, 9)),
    ("llama3", "bfloat16", (12, 0)),
    ("qwen2", "int8", (8, 0)),
    ("qwen3", "int4", (12, 0)),
    ("mistral", "fp8", (8, 9)),
]


@pytest.mark.parametrize(("model", "precision", "gpu"), QUICK)
def test_a_family_in_one_precision(
    store: Any, tmp_path: Path, model: str, precision: str, gpu: tuple[int, int]
) -> None:
    check_engine(build(store.serving(model), precision, gpu, tmp_path), precision)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_all_precisions_for_all_gpus(family: str, tmp_path: Path) -> None:
    from llmlab.graph.export import export
    from llmlab.graph.optimize import optimize

    given = FAMILIES[family]
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", given.config)
    graph = optimize(export(checkpoint, max_seq_len=given.max_seq_len))
    for precision in PRECISIONS:
        for gpu in GPUS:
            if precision != "fp8" or gpu >= (8, 9):
                check_engine(build(graph, precision, gpu, tmp_path), precision)


def test_there_is_no_fp8_below_8_9(store: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="contains HW-specific datatypes: fp8") as found:
        build(store.serving("mistral"), "fp8", (8, 0), tmp_path)
    assert "\n" not in str(found.value)


# The checks themselves: each has to see what it is there for.

Spoil = Callable[[Graph], object]


def half_an_engine(store: Any, folder: Path, precision: str, spoil: Spoil) -> Built:
    work, count = lowered(store.serving("llama3"), precision)
    spoil(work)
    return Built(compile_graph(work, (8, 9), folder), 2, count)


def test_activations_that_are_not_quantised_are_seen(store: Any, tmp_path: Path) -> None:
    weights_only = {**RECIPES["int8"].recipe, "base": "int8"}
    graph, count = quantise(ll.convert(store.serving("llama3"), "float16"), weights_only)
    (part,) = lower(graph, hosting="plugin", block_size=64).parts
    work: Any = part.graph  # type: ignore[union-attr]
    listing = compile_graph(work, (8, 9), tmp_path)
    check_profiles(listing)
    check_plugins(listing, 2)
    with pytest.raises(AssertionError, match="activations widened in front of a product"):
        check_products(listing, "int8", count)


def test_weights_that_something_else_reads_widened_are_seen(store: Any, tmp_path: Path) -> None:
    """A weight whose DequantizeLinear has a second reader, so that it can't go into the product alone."""

    def spoil(graph: Graph) -> None:
        edit = Editor(graph)
        node = next(n for n in edit.surgeon.nodes if n.op == "MatMul" and n.inputs[1].inputs)
        wide = edit.add("Neg", "spoilt", [node.inputs[1]], dtype=node.inputs[1].dtype, shape=node.inputs[1].shape)
        wide.name = "spoilt"
        graph.surgeon.outputs.append(wide)

    built = half_an_engine(store, tmp_path, "int8", spoil)
    with pytest.raises(AssertionError, match="weights widened by a layer of their own"):
        check_products(built.listing, "int8", built.quantised)


def test_a_model_without_the_plugin_is_seen(store: Any, tmp_path: Path) -> None:
    def spoil(graph: Graph) -> None:
        node = next(n for n in graph.surgeon.nodes if n.op == "PagedAttention")
        rows, out = node.inputs[0], node.outputs[0]
        pool, updated = node.inputs[(node.attrs["packed"] and 1) or 3], node.outputs[1]
        node.outputs.clear()
        width = [gs.Constant(f"w{i}", values) for i, values in enumerate(_slice(int(out.shape[1])))]
        graph.surgeon.nodes.append(gs.Node("Slice", "no-attention", inputs=[rows, *width], outputs=[out]))
        graph.surgeon.nodes.append(gs.Node("Identity", "no-cache", inputs=[pool], outputs=[updated]))
        graph.surgeon.cleanup().toposort()

    built = half_an_engine(store, tmp_path, "int8", spoil)
    with pytest.raises(AssertionError, match="a layer without its plugin"):
        check_plugins(built.listing, 2)
    check_profiles(built.listing)


def _slice(width: int) -> list[Any]:
    import numpy as np

    return [np.array([n], np.int64) for n in (0, width, 1, 1)]
