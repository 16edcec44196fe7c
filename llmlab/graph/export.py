"""Checkpoint or torch module → the plain graph: what torch writes, stateless, over padded `[batch, sequence]` tokens."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from llmlab.checkpoint import Checkpoint, resolve
from llmlab.config import ModelConfig
from llmlab.errors import CheckpointError, InputError, UnsupportedModelError, require
from llmlab.graph.graph import OPSET, Graph
from llmlab.graph.storage import onnx_dtype

if TYPE_CHECKING:
    import torch

_ROOT = "root."  # the wrapper's attribute; not part of any name that people see
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's name for what no module made


def export(
    source: str | Path | torch.nn.Module,
    *,
    config: Mapping[str, Any] | ModelConfig | None = None,
    trust_remote_code: bool = False,
) -> Graph:
    """Export a model to a plain ONNX graph (opset 23, float32) with inputs `input_ids`, `position_ids` i64 [batch, sequence].

    source: a checkpoint folder, a hub id, the name of a model that ships (`"tinychat"`), or a torch module whose
        `forward(input_ids, position_ids)` returns logits [batch, sequence, vocab] (or an object with `.logits`).
    config: for a torch module, its configuration (Hugging Face field names), unless the module has a `.config`.
    trust_remote_code: run modelling code that the checkpoint brings. Off: such a checkpoint is refused.

    Weights keep their checkpoint names and stay where they are: memory maps into the safetensors files, in the type
    they are stored in, with a Cast to float32 behind those stored narrower.
    """
    torch = require("torch", "export")
    require("onnxscript", "export")
    if isinstance(source, torch.nn.Module):
        model_config = _module_config(source, config)
        return Graph(_to_surgeon(source.eval(), {}), model_config)
    if config is not None:
        raise InputError("config goes with a torch module; a checkpoint brings its own config.json")
    if not isinstance(source, (str, Path)):
        raise InputError(
            f"source is a {type(source).__name__}; expected a checkpoint folder, a hub id or a torch module"
        )
    checkpoint = Checkpoint(resolve(source))
    model = _empty_model(checkpoint, trust_remote_code)
    return Graph(_to_surgeon(model, _locate_weights(model, checkpoint)), checkpoint.config, checkpoint.assets)


class StoredWeight(NamedTuple):
    """A parameter's name and values in the checkpoint."""

    name: str
    values: np.ndarray


def _module_config(module: torch.nn.Module, config: Mapping[str, Any] | ModelConfig | None) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if config is None and hasattr(module, "config"):
        config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    if config is None:
        raise InputError(f"{type(module).__name__} has no .config; pass config={{'model_type': …, 'vocab_size': …, …}}")
    return ModelConfig.from_hf(config)


def _empty_model(checkpoint: Checkpoint, trust_remote_code: bool) -> torch.nn.Module:
    """The transformers model of a checkpoint, its parameters allocated but never written: no memory is committed."""
    torch = require("torch", "export")
    transformers = require("transformers", "export")
    raw = checkpoint.config.raw
    if raw.get("quantization_config"):
        given = raw["quantization_config"]
        method = given.get("quant_method", "an unknown method") if isinstance(given, Mapping) else repr(given)
        raise UnsupportedModelError(
            f"{checkpoint.folder}: quantized with {method}; export the full-precision checkpoint and use llmlab to quantize"
        )
    if "auto_map" in raw and not trust_remote_code:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: brings its own code; pass trust_remote_code=True if you trust it"
        )
    from transformers.initialization import no_init_weights

    try:
        with _quiet(), no_init_weights():
            config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=trust_remote_code
            )
    except Exception as problem:  # transformers raises whatever its model code raises
        raise UnsupportedModelError(
            f"{checkpoint.folder}: transformers can't make a '{checkpoint.config.model_type}' model of it: {_reason(problem)}"
        ) from problem
    model.tie_weights()
    return model.eval()


def _locate_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Checkpoint tensors by the model's parameter name. Raises CheckpointError where one is missing or misshapen."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    found: dict[str, StoredWeight] = {}
    by_tensor: dict[int, StoredWeight] = {}  # a tied parameter has several names, of which the checkpoint holds one
    missing: dict[str, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names = (name, name.removeprefix(prefix), prefix + name)
        stored_name = next((n for n in names if n in checkpoint.weights), None)
        if stored_name is None:
            missing[name] = id(tensor)
            continue
        stored = checkpoint.weights[stored_name]
        if stored.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{stored.path}: '{stored_name}' has shape {list(stored.shape)}, the config asks for {list(tensor.shape)}"
            )
        found[name] = by_tensor[id(tensor)] = StoredWeight(stored_name, stored.map())
    for name, key in missing.items():
        if key not in by_tensor:
            raise CheckpointError(
                f"{checkpoint.folder}: no tensor '{name}' in it; the checkpoint is incomplete, of another model, or names it otherwise"
            )
        found[name] = by_tensor[key]
    used = {weight.name for weight in found.values()}
    unused = [
        n for n in checkpoint.weights if n not in used and not n.endswith(("inv_freq", "masked_bias", ".attn.bias"))
    ]
    if unused:
        warnings.warn(
            f"{checkpoint.folder}: {len(unused)} tensors have no place in the model and are left out, such as '{unused[0]}'",
            stacklevel=3,
        )
    return found


def _to_surgeon(model: torch.nn.Module, weights: Mapping[str, StoredWeight]) -> gs.Graph:
    """Trace `model` and bring the trace to the surgeon, with `weights` in the places of the model's own parameters."""
    torch = require("torch", "export")
    wrapper = _wrap(model)
    ids = torch.zeros(2, 7, dtype=torch.long)
    positions = torch.arange(7).expand(2, 7)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                wrapper, (ids, positions), dynamic_shapes=({0: batch, 1: sequence},) * 2, strict=False
            )
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=["input_ids", "position_ids"],
                output_names=["logits"],
            )
    except Exception as problem:  # torch.export has many
        raise UnsupportedModelError(f"{type(model).__name__}: torch can't export it: {_reason(problem)}") from problem
    return _import(exported.model, weights)


def _reason(problem: BaseException) -> str:
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
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(to_proto(model), data_prop=True))
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
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "").strip("[]").split(", ")
        scope = scopes[-2].strip("'") if len(scopes) > 1 else ""
        scope = scope.removeprefix(_ROOT) if scope not in (_ROOT.rstrip("."), _NO_MODULE) else ""
        name = f"{scope}/{node.op_type}"
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name] - 1}"
    for value in model.graph.outputs:
        value.name = "logits"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
