"""An ONNX file that something else wrote → the plain graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from llmlab.checkpoint import ASSETS
from llmlab.config import ModelConfig
from llmlab.errors import GraphError, InputError, UnsupportedModelError
from llmlab.files import read_bytes, read_json, refuse_links
from llmlab.graph.analysis.evaluate import CannotEvaluate, PositionFunction
from llmlab.graph.graph import OPSET, Graph
from llmlab.graph.sources.concrete_shapes import BATCH, SEQUENCE, infer
from llmlab.graph.sources.naming import name_nodes
from llmlab.graph.sources.opset import check_age, convert_opset
from llmlab.graph.store.check import check_model
from llmlab.graph.store.deferred import Packed
from llmlab.graph.store.external import map_external
from llmlab.graph.store.lazy import Values
from llmlab.graph.store.packed import is_packed
from llmlab.graph.store.storage import fill_constants, from_proto, parse_onnx

ONNX_SUFFIX = ".onnx"
_TOKENS, _POSITIONS, _MASK, _LOGITS = "input_ids", "position_ids", "attention_mask", "logits"
_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SMALL = 1024  # bytes; smaller constants stay in the protobuf, where the passes read them


def open_onnx(
    path: Path,
    config: Mapping[str, Any] | ModelConfig | str | Path | None = None,
    *,
    max_seq_len: int | None = None,
) -> Graph:
    """A plain graph from `path`, an ONNX file with inputs `input_ids`, optionally `position_ids` and `attention_mask`
    (integers [batch, sequence]), and the output `logits` [batch, sequence, vocab].

    config: a Hugging Face config, the path of a config.json, or None for the one beside the file. Tokenizer files
    beside it come along. max_seq_len: longest sequence in tokens, None for the config's. Initializers keep their names; those in other files of the folder become memory maps.
    Opsets 13 and later are brought to the project's; float16 and bfloat16 graphs compute in float32, on weights as they
    are stored. Positions that the graph works out itself become the input `position_ids`, and the attention mask, which
    only tells padding from tokens, becomes ones: the serving graph has no padding. What the file declares about types and
    shapes inside the graph is not believed but inferred.
    Raises GraphError for a file that is damaged or contradicts itself, UnsupportedModelError for one of another kind.
    """
    model_config = _config(path, config).limited(max_seq_len)
    refuse_links((path.parent / name for name in ASSETS), GraphError)
    assets = {n: read_bytes(path.parent / n, GraphError) for n in ASSETS if (path.parent / n).is_file()}
    model = parse_onnx(path)
    where = str(path)
    check_age(model, where)
    check_model(model, path, domains=())
    arrays = _take_weights(model, path)
    model = _written_out(model, path)
    name_nodes(model.graph.node)
    convert_opset(model, where, OPSET)
    _ports(model, where)
    _widen(model, arrays)
    return Graph(_to_surgeon(model, arrays, where, model_config), model_config, assets)


def _config(path: Path, config: Mapping[str, Any] | ModelConfig | str | Path | None) -> ModelConfig:
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, Mapping):
        return ModelConfig.from_hf(config)
    where = Path(config).expanduser() if config is not None else path.parent / "config.json"
    if config is None and not where.exists():
        raise InputError(f"{path}: no config.json beside it; pass config=, the model's Hugging Face config or its path")
    if config is None:
        refuse_links([where], GraphError)
    return ModelConfig.from_hf(read_json(where, GraphError), where=str(where))


def _take_weights(model: ModelProto, path: Path) -> dict[str, Values]:
    """Arrays of all initializers but small ones, by name; in the protobuf, a reference to nothing is left of them."""
    arrays = map_external(path, model.graph.initializer)
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() >= _SMALL:
            values = numpy_helper.to_array(tensor)
            arrays[tensor.name] = Packed.of(values) if is_packed(values.dtype) else values
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(
                TensorProto(
                    name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
                )
            )
            tensor.external_data.add(key="location", value="weights")
    given = {*arrays, *(t.name for t in model.graph.initializer)}
    inputs = [v for v in model.graph.input if v.name not in given]  # until IR version 4, weights were inputs too
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return arrays


def _written_out(model: ModelProto, path: Path) -> ModelProto:
    """The model with its functions in place, and without what only people read."""
    for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
        node.doc_string = ""
    del model.graph.value_info[:]
    del model.training_info[:]
    for function in model.functions:
        del function.value_info[:]
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as problem:  # a function of another opset than the model
        raise GraphError(f"{path}: its functions can't be written out: {' '.join(str(problem).split())}") from problem


def _ports(model: ModelProto, where: str) -> None:
    """Inputs `input_ids` and `position_ids`, output `logits`, or one line that says what is in the way."""
    graph = model.graph
    inputs = {v.name: v for v in graph.input}
    if cached := [n for n in inputs if "past" in n or "cache" in n]:
        raise UnsupportedModelError(
            f"{where}: has a KV cache of its own ({cached[0]}, …); export it without one (use_cache=False)"
        )
    known = (_TOKENS, _POSITIONS, _MASK)
    if _TOKENS not in inputs or any(n not in known for n in inputs):
        raise UnsupportedModelError(
            f"{where}: has inputs {', '.join(inputs) or 'none'}; expected input_ids and, if need be, position_ids and attention_mask"
        )
    for value in inputs.values():
        kind = value.type.tensor_type
        if kind.elem_type not in (TensorProto.INT64, TensorProto.INT32) or len(kind.shape.dim) != 2:
            raise UnsupportedModelError(f"{where}: {value.name} is not an integer [batch, sequence]")
        if fixed := [d.dim_value for d in kind.shape.dim if d.dim_value]:
            raise UnsupportedModelError(
                f"{where}: {value.name} has a fixed size of {fixed[0]}; export it with dynamic batch and sequence"
            )
    logits = [v for v in graph.output if v.name == _LOGITS]
    if not logits:
        raise UnsupportedModelError(f"{where}: has outputs {', '.join(v.name for v in graph.output)}; expected logits")
    del graph.input[:]
    del graph.output[:]
    graph.output.append(logits[0])
    front = [_as_int64(graph, inputs[n]) for n in (_TOKENS, _POSITIONS) if n in inputs]
    for node in filter(None, front):
        graph.node.insert(0, node)
    if _MASK in inputs:
        _no_padding(model, inputs[_MASK].type.tensor_type.elem_type)


def _as_int64(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> NodeProto | None:
    """Make `value` an input of the graph, with a Cast behind it where the graph reads int32."""
    graph.input.append(helper.make_tensor_value_info(value.name, TensorProto.INT64, [BATCH, SEQUENCE]))
    if value.type.tensor_type.elem_type == TensorProto.INT64:
        return None
    _rename(graph, value.name, f"{value.name}.int32")
    return helper.make_node(
        "Cast", [value.name], [f"{value.name}.int32"], f"{value.name}/Cast", to=value.type.tensor_type.elem_type
    )


def _no_padding(model: ModelProto, elem_type: int) -> None:
    """The attention mask becomes ones of the tokens' shape."""
    fill = helper.make_tensor("one", elem_type, [1], [1])
    size = f"{_MASK}.size"
    model.graph.node.insert(
        0, helper.make_node("ConstantOfShape", [size], [_MASK], f"{_MASK}/ConstantOfShape", value=fill)
    )
    model.graph.node.insert(0, helper.make_node("Shape", [_TOKENS], [size], f"{_MASK}/Shape"))


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every node read `new` in place of `old`."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _widen(model: ModelProto, arrays: Mapping[str, Values]) -> None:
    """float16 and bfloat16 → float32, with a Cast behind each weight, which stays as it is stored."""
    casts: list[NodeProto] = []
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type not in _NARROW:
            continue
        if tensor.name not in arrays:
            tensor.CopyFrom(_float32(tensor))
            continue
        wide = f"{tensor.name}.wide"
        _rename(graph, tensor.name, wide)
        scope, _, last = tensor.name.rpartition(".")
        casts.append(helper.make_node("Cast", [tensor.name], [wide], f"{scope}/Cast_{last}", to=TensorProto.FLOAT))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            if attribute.t.data_type in _NARROW:
                attribute.t.CopyFrom(_float32(attribute.t))
    for i, node in enumerate(casts):
        graph.node.insert(i, node)


def _float32(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _to_surgeon(model: ModelProto, arrays: Mapping[str, Values], where: str, config: ModelConfig) -> gs.Graph:
    longest = config.max_position_embeddings
    graph = _import(model, arrays, where, longest)
    if all(t.name != _POSITIONS for t in graph.inputs):
        # Tensors that turn out to be the tokens' positions are read from the input that says them.
        names = _own_positions(graph, longest)
        model.graph.input.append(helper.make_tensor_value_info(_POSITIONS, TensorProto.INT64, [BATCH, SEQUENCE]))
        for name in names:
            _rename(model.graph, name, _POSITIONS)
        graph = _import(model, arrays, where, longest)
    (logits,) = graph.outputs
    if logits.dtype != np.float32 or list(logits.shape or ())[:2] != [BATCH, SEQUENCE] or len(logits.shape) != 3:
        raise UnsupportedModelError(
            f"{where}: logits are {logits.dtype} {logits.shape}; expected float32 [batch, sequence, vocab]"
        )
    if logits.shape[2] != config.vocab_size:
        raise GraphError(
            f"{where}: has {logits.shape[2]} logits a token, the config's vocab_size is {config.vocab_size}: is it another model's config?"
        )
    return graph


def _import(model: ModelProto, arrays: Mapping[str, Values], where: str, longest: int) -> gs.Graph:
    """The surgeon's graph, with inferred types and shapes, and `arrays` in the places of the initializers."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.ClearField("shape")
    known = infer(model, where, longest)
    del graph.value_info[:]
    for value in graph.input:
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.INT64, [BATCH, SEQUENCE]))
    logits = graph.output[0]
    for name, (elem_type, shape) in known.items():
        info = logits if name == logits.name else graph.value_info.add()
        info.CopyFrom(helper.make_tensor_value_info(name, elem_type, shape))
    surgeon = from_proto(model)
    fill_constants(surgeon, arrays)
    return surgeon


def _own_positions(graph: gs.Graph, longest: int) -> list[str]:
    """Names of the tensors [batch or 1, sequence] of integers that hold each token's position, found by evaluating them."""
    candidates = []
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.dtype == np.int64 and tensor.shape in ([BATCH, SEQUENCE], [1, SEQUENCE]):
                function = PositionFunction([tensor])
                if function.dependence() is None and _is_position(function, longest):
                    candidates.append(tensor.name)
    return candidates


def _is_position(function: PositionFunction, longest: int) -> bool:
    for batch, length in ((1, 1), (2, min(7, longest)), (1, longest)):
        # Zeros: the positions must come from the sizes.
        try:
            (found,) = function(np.zeros((batch, length), np.int64))
        except CannotEvaluate:
            return False
        if found.ndim != 2 or not np.array_equal(
            np.broadcast_to(found, (batch, length)), np.tile(np.arange(length), (batch, 1))
        ):
            return False
    return True
