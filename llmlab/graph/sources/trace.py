"""Torch module → surgeon graph: traced without a cache, nodes named after their modules, weights put in their places."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from llmlab.errors import InputError, UnsupportedModelError, require
from llmlab.graph.graph import OPSET
from llmlab.graph.operators.torch_operator import add_functions, translations
from llmlab.graph.sources.naming import SCOPES, innermost
from llmlab.graph.sources.weights import StoredWeight
from llmlab.graph.store.storage import from_proto, onnx_dtype

if TYPE_CHECKING:
    import torch

_ROOT = "root."  # the wrapper's attribute; not part of any name that people see
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's name for what no module made


STAGES = (LOADING, TRACING, WRITING, READING) = ("loading torch", "tracing", "writing ONNX", "reading it")


def trace(
    model: torch.nn.Module, weights: Mapping[str, StoredWeight], longest: int, begins: Callable[[str], None]
) -> gs.Graph:
    """Trace `model`, for sequences of less than `longest` tokens (where stored masks and biases end), and bring the trace
    to the surgeon, with `weights` in the places of the model's own parameters. `begins` hears of each of the STAGES."""
    torch = require("torch", "export")
    wrapper = _wrap(model)
    ids = torch.zeros(2, 7, dtype=torch.long)
    positions = torch.arange(7).expand(2, 7)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=max(longest - 1, ids.shape[1]))
    try:
        with quiet(), torch.no_grad(), _experts_as_operators(model), _one_head_for_all():
            begins(TRACING)
            program = torch.export.export(
                wrapper, (ids, positions), dynamic_shapes=({0: batch, 1: sequence},) * 2, strict=False
            )
            begins(WRITING)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=["input_ids", "position_ids"],
                output_names=["logits"],
                custom_translation_table=translations(),
            )
    except Exception as problem:  # torch.export has many
        raise UnsupportedModelError(f"{type(model).__name__}: torch can't export it: {reason(problem)}") from problem
    begins(READING)
    return _import(exported.model, weights)


@contextlib.contextmanager
def _experts_as_operators(model: torch.nn.Module) -> Iterator[None]:
    """A transformers model computes its experts as batched products while it is traced: its loops can't be, that can."""
    if not hasattr(model, "set_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def _one_head_for_all() -> Iterator[None]:
    """SDPA broadcasts one KV head to all query heads; torch's ONNX exporter wants to see them as many."""
    from torch.nn import functional

    attend = functional.scaled_dot_product_attention

    def expanded(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        if key.ndim == 4 and key.shape[1] == 1 != query.shape[1]:
            key, value = (t.expand(-1, query.shape[1], -1, -1) for t in (key, value))
        return attend(query, key, value, *args, **options)

    functional.scaled_dot_product_attention = expanded
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend


def reason(problem: BaseException) -> str:
    """The first line of what went wrong at the bottom: torch wraps it in advice, with colours."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(problem)).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


def _wrap(model: torch.nn.Module) -> torch.nn.Module:
    import torch

    accepted = inspect.signature(model.forward).parameters
    flexible = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    with_positions = flexible or "position_ids" in accepted
    if "input_ids" not in accepted and not flexible:
        raise InputError(f"{type(model).__name__}.forward has no input_ids; expected forward(input_ids, position_ids)")

    class Stateless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.root = model

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            extra = {"position_ids": position_ids} if with_positions else {}
            out = self.root(input_ids=input_ids, **extra, **fixed)
            return out.logits if hasattr(out, "logits") else out

    return Stateless().eval()


def _import(model: Any, weights: Mapping[str, StoredWeight]) -> gs.Graph:
    """onnx_ir model → surgeon graph; large initializers never pass through the protobuf."""
    from onnx_ir import ExternalTensor, to_proto

    arrays: dict[str, StoredWeight] = {}
    for name, initializer in model.graph.initializers.items():
        own = name.removeprefix(_ROOT)
        if own in weights:
            arrays[name] = weights[own]
        elif initializer.const_value.nbytes >= 1024:
            arrays[name] = StoredWeight(own, initializer.const_value.numpy())
        else:
            continue
        stand_in = initializer.const_value
        initializer.const_value = ExternalTensor("weights", 0, 0, stand_in.dtype, shape=stand_in.shape, name=name)
    _name_nodes(model)
    proto = to_proto(model)
    add_functions(proto)
    graph = from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    for node in graph.nodes:
        if node.op == "Constant" and node.attrs.get("value_ints") == []:  # typeless: the surgeon couldn't write it
            node.attrs = {"value": gs.Constant(f"{node.name}/value", np.zeros(0, np.int64))}
    for name, tensor in graph.tensors().items():
        if not isinstance(tensor, gs.Constant):
            continue
        tensor.data_location = None
        if name in arrays:
            declared = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor._values.tensor.data_type))
            tensor.name, tensor._values = arrays[name]
            _widen(graph, tensor, declared)
        else:
            tensor.name = name.removeprefix(_ROOT)
            if isinstance(tensor._values, LazyValues):
                tensor._values = tensor._values.load()
    return graph


def _widen(graph: gs.Graph, weight: gs.Constant, dtype: np.dtype) -> None:
    """Put a Cast behind a weight that is stored in another type than the graph computes in."""
    if weight._values.dtype == dtype:
        return
    consumers = list(weight.outputs)
    wide = gs.Variable(f"{weight.name}.wide", dtype, list(weight._values.shape))
    for node in consumers:
        node.inputs = [wide if t is weight else t for t in node.inputs]
    scope = weight.name.rpartition(".")[0]
    graph.nodes.insert(
        0,
        gs.Node("Cast", f"{scope}/Cast_{weight.name.rpartition('.')[2]}", {"to": onnx_dtype(dtype)}, [weight], [wide]),
    )


def _name_nodes(model: Any) -> None:
    """Name each node after the module that made it: `model.layers.0.mlp/MatMul`."""
    count: Counter[str] = Counter()
    for node in model.graph:
        scope = innermost(node.metadata_props.get(SCOPES, ""))
        scope = scope.removeprefix(_ROOT) if scope not in (_ROOT.rstrip("."), _NO_MODULE) else ""
        name = f"{scope}/{node.op_type}"
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name] - 1}"
    for value in model.graph.outputs:
        value.name = "logits"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter talks about what is none of the user's business; errors still raise."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
