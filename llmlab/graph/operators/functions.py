"""Functions that travel with a graph: the bodies of nodes that no target knows by name."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from llmlab.errors import GraphError
from llmlab.graph.edit import Editor, constant_expression, inline_constants, scope, sort_nodes, value
from llmlab.graph.operators.body import IMPLEMENTATION
from llmlab.graph.store.storage import External, from_proto, onnx_dtype

_SMALL = 1024  # bytes; constants up to here may be axes or sizes, and their values matter


def function_of(graph: gs.Graph, node: gs.Node) -> gs.Function | None:
    """The function of `graph` that `node` calls, if it calls one."""
    key = (node.domain or "", node.op)
    return next((f for f in graph.functions if f.unique_id == key), None)


def used_functions(graph: gs.Graph, nodes: Iterable[gs.Node]) -> list[gs.Function]:
    """Copies of the functions that `nodes` call, and those that these call."""
    found: dict[tuple[str, str], gs.Function] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        pending.extend(n for sub in node.subgraphs(recursive=True) for n in sub.nodes)
        function = function_of(graph, node)
        if function is not None and function.unique_id not in found:
            found[function.unique_id] = function.copy()
            pending.extend(function.nodes)
    return list(found.values())


def add_function(graph: gs.Graph, proto: onnx.FunctionProto) -> None:
    """Let `graph` carry a function. Raises GraphError where it carries another of that name."""
    for function in graph.functions:
        if function.unique_id == (proto.domain, proto.name):
            if function.doc_string != proto.doc_string:
                raise GraphError(
                    f"the graph has another body for {proto.domain}::{proto.name} than the one declared now: export it again"
                )
            return
    graph.functions.append(OnnxImporter.import_function(proto))


def record_implementation(graph: gs.Graph, implementation: str) -> None:
    """Note in each node that calls a declared operator's function what a target runs for it."""
    for node in graph.nodes:
        function = function_of(graph, node)
        if function is not None and IMPLEMENTATION in function.attrs:
            node.attrs[IMPLEMENTATION] = implementation


def inlined(graph: gs.Graph, node: gs.Node) -> gs.Graph | None:
    """What `node` computes, as a graph of ONNX's own operators between its inputs and outputs, with shapes inferred;
    None where it calls no function. Large constants have a shape but no values."""
    if function_of(graph, node) is None:
        return None
    model = _body(graph, node)
    for inner in model.graph.node:
        if inner.op_type == "CastLike":  # the second operand gives its type alone
            inner.op_type = "Identity"
            del inner.input[1:]
    result = from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))
    inline_constants(result)
    return result.cleanup()


def inline_functions(edit: Editor) -> None:
    """Put the body of every function that a node calls in the node's place, for a target that reads no functions.

    Raises GraphError where the type that a constant of the body takes can't be inferred.
    """
    for node in list(edit.surgeon.nodes):
        if function_of(edit.surgeon, node) is None:
            continue
        body = from_proto(onnx.shape_inference.infer_shapes(_body(edit.surgeon, node), data_prop=True))
        inline_constants(body)
        outer: dict[str, gs.Tensor] = {t.name: t for t in node.inputs if t.name}
        for inner in sort_nodes(body).nodes:
            if inner.op == "CastLike":
                _to_cast(node, inner)
            reads = [_outside(edit, scope(node), t, outer) for t in inner.inputs]
            made = edit.add_many(inner.op, scope(node), reads, inner.attrs, [(t.dtype, t.shape) for t in inner.outputs])
            outer.update(zip((t.name for t in inner.outputs), made, strict=True))
        for tensor in list(node.outputs):
            outer[tensor.name].dtype, outer[tensor.name].shape = tensor.dtype, tensor.shape
            edit.replace(tensor, outer[tensor.name])
        node.outputs.clear()
    edit.surgeon.functions = []
    sort_nodes(edit.surgeon.cleanup())


def _to_cast(node: gs.Node, inner: gs.Node) -> None:
    like = inner.inputs[1]
    if like.dtype is None:
        raise GraphError(f"{node.name}: the type of {like.name} inside {node.op} can't be inferred")
    inner.op, inner.attrs = "Cast", {"to": onnx_dtype(like.dtype)}
    inner.inputs = inner.inputs[:1]
    inner.outputs[0].dtype = like.dtype


def _outside(edit: Editor, where: str, tensor: gs.Tensor, outer: dict[str, gs.Tensor]) -> gs.Tensor | None:
    """The tensor of the graph around a body that stands for one in it; its constants come along."""
    if not tensor.name:
        return None
    if tensor.name not in outer:
        outer[tensor.name] = edit.constant(f"{where}/constant", np.asarray(tensor.values))
    return outer[tensor.name]


def _body(graph: gs.Graph, node: gs.Node) -> onnx.ModelProto:
    """The function that `node` calls as a model of ONNX's own operators, without the values of large constants."""
    stand_ins: dict[str, gs.Tensor] = {}
    for tensor in node.inputs:
        if tensor.name and tensor.name not in stand_ins:
            stand_ins[tensor.name] = _stand_in(tensor)
    outputs = [gs.Variable(t.name, t.dtype) for t in node.outputs]
    inputs = [stand_ins[t.name] if t.name else gs.Variable.empty() for t in node.inputs]
    call = node.copy(inputs, outputs)
    sources = [t for t in stand_ins.values() if isinstance(t, gs.Variable)]
    functions = used_functions(graph, [node])
    alone = gs.Graph([call], sources, outputs, opset=graph.opset, functions=functions)
    return onnx.inliner.inline_local_functions(gs.export_onnx(alone, do_type_check=False, ir_version=11))


def _stand_in(tensor: gs.Tensor) -> gs.Tensor:
    small = value(tensor, _SMALL)
    if small is not None:
        return gs.Constant(tensor.name, small)
    if constant_expression(tensor) and tensor.dtype is not None and _static(tensor):
        shape = tuple(int(d) for d in tensor.shape)
        dtype = np.dtype(tensor.dtype)
        return gs.Constant(tensor.name, External("weights", 0, int(np.prod(shape)) * dtype.itemsize, dtype, shape))
    return gs.Variable(tensor.name, tensor.dtype, tensor.shape)


def _static(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and all(isinstance(d, int) for d in tensor.shape)
