"""The serving graph for TensorRT: ONNX that its parsers read, in one piece or cut at attention. Needs no TensorRT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmlab.errors import InputError
from llmlab.graph.edit import Editor, sort_nodes
from llmlab.graph.graph import OPSET, Graph
from llmlab.graph.lower.gated import expand_gated
from llmlab.graph.lower.int32 import int32_inputs
from llmlab.graph.lower.opset import legalise
from llmlab.graph.lower.origins import origins
from llmlab.graph.lower.tensorrt_experts import expand_experts
from llmlab.graph.lower.tensorrt_native import native_attention
from llmlab.graph.lower.tensorrt_norms import mark_norms
from llmlab.graph.lower.tensorrt_parts import Lowered
from llmlab.graph.lower.tensorrt_piecewise import cut_at_kernels
from llmlab.graph.lower.tensorrt_plugin import plugin_nodes
from llmlab.graph.lower.tensorrt_products import mark_products
from llmlab.graph.lower.tensorrt_quantized import quantized_products
from llmlab.graph.lower.weights import defer_weights
from llmlab.graph.operators.functions import inline_functions
from llmlab.graph.passes.convert_precision import computes_wide
from llmlab.kernels.gpu.geometry import QUANTIZED_POOLS
from llmlab.kernels.kv_cache import RANGES

HOSTINGS = ("piecewise", "plugin", "native")
OLDEST_OPSET = 17
SCALES = (12, 13)
"""Inputs of PagedAttention: scales of keys and of values."""


def lower(
    graph: Graph,
    *,
    hosting: str = "piecewise",
    dialect: int = OPSET,
    weak_type: str | None = None,
    block_size: int | None = None,
    products: bool = False,
) -> Lowered:
    """The serving graph as ONNX for TensorRT; the given graph is not changed, and no large weight is read.

    hosting: `piecewise` cuts it at attention, whose kernels run between the parts; `plugin` keeps it whole, with
        PagedAttention as nodes that a plugin runs on KV blocks of `block_size` tokens; `native` has ONNX's own attention
        over slots of `block_size` tokens, one a sequence (`tensorrt_native` says what a step consists of).
    dialect: the ONNX opset that the parser reads, 17 (TensorRT 8.6) to 23; native attention is of a later one.
    weak_type: under weak typing, what TensorRT may compute in and what parts hand each other (float16). The graph has to be
        in float32 and stays so, without a Cast; `Dense.keep_fp32` says what must not be narrowed. Without it the graph's own
        types hold: convert it first (`llmlab.convert`).
    products: in piecewise hosting, in float16 or bfloat16, cut at large linear layers and at norms too, for kernels of ours, and leave all
        weights outside the parts, so that those of layers which are alike are one.
    Raises InputError for arguments that don't fit, and UnsupportedModelError that names a node which can't be expressed.
    """
    block = _check(graph, hosting, dialect, weak_type, block_size, products)
    work = graph.copy()
    edit = Editor(work)
    inline_functions(edit)
    wide = computes_wide(work, np.dtype(weak_type)) if weak_type is not None else set()
    keep = set(wide)
    if products:
        dtype = weak_type or graph.activations
        mark_products(edit, dtype, weak_type is not None, wide)
        mark_norms(edit, dtype, weak_type is not None)
    expand_gated(edit)
    expand_experts(edit, keep)
    quantized_products(edit, dialect)
    int32_inputs(edit)
    legalise(edit, dialect, keep)
    defer_weights(work.surgeon)
    sort_nodes(work.surgeon.cleanup())
    if weak_type is None:
        keep.clear()
    found = origins(graph, work)  # hosting takes nodes apart, and names none anew
    if hosting == "plugin":
        made = plugin_nodes(edit, block)
    elif hosting == "native":
        made = native_attention(edit, block)
    else:
        made = cut_at_kernels(edit, weak_type, wide, keep, products)
    return replace(made, origins=found)


def _check(
    graph: Graph, hosting: str, dialect: int, weak_type: str | None, block_size: int | None, products: bool
) -> int:
    """Raises InputError unless the arguments of `lower` fit together; gives the block size (0 in piecewise hosting)."""
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    if hosting not in HOSTINGS:
        raise InputError(f"hosting is {hosting!r}; available: {', '.join(HOSTINGS)}")
    if isinstance(dialect, bool) or not isinstance(dialect, int) or not OLDEST_OPSET <= dialect <= OPSET:
        raise InputError(f"dialect is {dialect!r}, expected an ONNX opset from {OLDEST_OPSET} to {OPSET}")
    dtype = graph.activations
    check_caches(graph, hosting)
    if weak_type not in (None, "float16"):
        raise InputError(f"weak_type is {weak_type!r}, expected 'float16' or None")
    if weak_type is not None and dtype != "float32":
        raise InputError(f"weak typing starts from float32, the graph is in {dtype}: lower the unconverted one")
    if products and (hosting != "piecewise" or (weak_type is None and dtype == "float32")):
        raise InputError("products are kernels in piecewise hosting alone, in float16 or bfloat16")
    if hosting == "piecewise":
        return 0
    if weak_type is not None or dtype == "float32":
        raise InputError(f"{hosting} hosting is strongly typed: convert the graph to float16 or bfloat16 first")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise InputError(f"block_size is {block_size!r}, expected a number of tokens")
    return block_size


def check_caches(graph: Graph, hosting: str) -> None:
    """Raises InputError for KV caches that no kernel of ours reads, or that differ between layers."""
    given = {layer.dtype.name for layer in graph.kv_layers()}
    if len(given) > 1:
        raise InputError(f"the layers' KV caches are {', '.join(sorted(given))}: expected one type for all of them")
    (dtype,) = given
    if dtype not in RANGES:
        return
    if hosting == "native":
        raise InputError(f"native hosting has no KV cache in {dtype}: build with 'plugin' or 'piecewise'")
    if dtype not in QUANTIZED_POOLS:
        raise InputError(
            f"a KV cache in {dtype} is for onnxruntime, for TensorRT there are {' and '.join(QUANTIZED_POOLS)}: build for "
            "target='onnxruntime', or quantize with kv_int8 or kv_fp8"
        )
    for node in (n for n in graph.surgeon.nodes if n.op == "PagedAttention"):
        if any(len(node.inputs[i].shape) > 1 for i in SCALES):
            raise InputError(
                f"{node.name}: its KV cache has a scale for each channel, which is for onnxruntime: quantize with a scale per head "
                "or per tensor"
            )
