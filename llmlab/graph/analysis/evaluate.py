"""Evaluate a small part of a graph on chosen positions: what a mask or a RoPE table *is*, however it was written."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from llmlab.graph.analysis.bounded import BoundedSession, CannotEvaluate
from llmlab.graph.edit import ancestors, is_bfloat16, sort_nodes
from llmlab.graph.graph import OPSET

__all__ = ["CannotEvaluate", "Excerpt", "PositionFunction"]

INT64 = np.dtype(np.int64)


class PositionFunction:
    """Tensors that depend on `input_ids`' shape and `position_ids` alone, as one function that can be called.

    Recognising by value and not by spelling is what keeps the passes independent of who wrote the graph.
    """

    def __init__(self, tensors: list[gs.Tensor]) -> None:
        nodes: dict[int, gs.Node] = {}
        self.sources: set[str] = set()
        for tensor in tensors:
            some, sources = ancestors(tensor)
            nodes |= {id(n): n for n in some}
            self.sources |= sources
        self.nodes = list(nodes.values())
        self.tensors = tensors
        self._session: BoundedSession | None = None

    def dependence(self) -> str | None:
        """None where the tensors depend on positions and sizes alone, else what else they depend on."""
        if foreign := self.sources - {"input_ids", "position_ids"}:
            return f"depends on {', '.join(sorted(foreign))}"
        pending, seen = list(self.tensors), set()
        while pending:  # what is only asked for its shape is not read
            for node in pending.pop().inputs:
                if id(node) in seen or node.op in ("Shape", "Size"):
                    continue
                seen.add(id(node))
                if any(t.name == "input_ids" and not t.inputs for t in node.inputs):
                    return f"depends on the tokens themselves ({node.name})"
                pending.extend(node.inputs)
        return None

    def __call__(self, position_ids: NDArray[np.int64]) -> list[np.ndarray]:
        """Evaluate at `position_ids` [batch, sequence], or [T] of a packed graph; `input_ids` are zeros of that shape.

        Raises CannotEvaluate.
        """
        if self._session is None:
            inputs = [gs.Variable(n, INT64) for n in sorted(self.sources)]
            self._session = excerpt(self.nodes, self.tensors, inputs)
        return self._session.run({"position_ids": position_ids, "input_ids": np.zeros_like(position_ids)})


class Excerpt:
    """What a graph computes of `outputs` from `inputs` (and constants), as one function that can be called."""

    def __init__(self, inputs: list[gs.Tensor], outputs: list[gs.Tensor]) -> None:
        self._names = [t.name for t in inputs]
        given, nodes, pending = {id(t) for t in inputs}, {}, list(outputs)
        while pending:
            tensor = pending.pop()
            if id(tensor) not in given and tensor.inputs and id(tensor.inputs[0]) not in nodes:
                nodes[id(tensor.inputs[0])] = tensor.inputs[0]
                pending.extend(tensor.inputs[0].inputs)
        self._nodes, self._outputs = list(nodes.values()), outputs
        self._inputs = [gs.Variable(t.name, t.dtype or np.dtype(np.float32)) for t in inputs]
        self._session: BoundedSession | None = None

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The outputs, given an array for each input. Raises CannotEvaluate."""
        if self._session is None:
            self._session = excerpt(self._nodes, self._outputs, self._inputs)
        return self._session.run(dict(zip(self._names, arrays, strict=True)))


def excerpt(nodes: list[gs.Node], tensors: list[gs.Tensor], inputs: list[gs.Variable]) -> BoundedSession:
    """A session that computes `tensors` with copies of `nodes`, from inputs that stand for the tensors of their names.

    Raises CannotEvaluate.
    """
    outputs = [gs.Variable(f"result_{i}", t.dtype, None) for i, t in enumerate(tensors)]
    by_name: dict[str, gs.Tensor] = {t.name: t for t in inputs}
    tails = [
        gs.Node("Identity", inputs=[_stand_in(t, by_name)], outputs=[o]) for t, o in zip(tensors, outputs, strict=True)
    ]
    copies = [
        gs.Node(
            n.op,
            n.name,
            dict(n.attrs),
            [_stand_in(t, by_name) for t in n.inputs],
            [_stand_in(t, by_name) for t in n.outputs],
            domain=n.domain,
        )
        for n in nodes
    ]
    copies = [part for node in copies for part in _through_float32(node)]
    graph = sort_nodes(gs.Graph(copies + tails, inputs, outputs, opset=OPSET))
    try:
        model = gs.export_onnx(graph, do_type_check=False, ir_version=11)
    except Exception as problem:  # the surgeon raises whatever an odd attribute makes of it
        raise CannotEvaluate(" ".join(str(problem).split())) from problem
    return BoundedSession(model)


def _through_float32(node: gs.Node) -> list[gs.Node]:
    """The node, or where it computes in bfloat16, which ONNX Runtime's CPU mostly can't, the same in float32 and rounded."""
    if node.op == "Cast" or not any(is_bfloat16(t) for t in (*node.inputs, *node.outputs)):
        return [node]
    inputs, outputs = list(node.inputs), list(node.outputs)
    casts = []
    for side, target in ((inputs, onnx.TensorProto.FLOAT), (outputs, onnx.TensorProto.BFLOAT16)):
        for i, tensor in enumerate(side):
            if is_bfloat16(tensor):
                wide = side[i] = gs.Variable(f"{node.name}/{tensor.name}/{i}/{target}", np.dtype(np.float32))
                ends = ([tensor], [wide]) if side is inputs else ([wide], [tensor])
                casts.append(gs.Node("Cast", f"{wide.name}/Cast", {"to": target}, *ends))
    attrs, name, domain = dict(node.attrs), node.name, node.domain
    node.inputs.clear()
    node.outputs.clear()
    return [*casts, gs.Node(node.op, name, attrs, inputs, outputs, domain=domain)]


def _stand_in(tensor: gs.Tensor, by_name: dict[str, gs.Tensor]) -> gs.Tensor:
    """A copy of `tensor` for the excerpt, the same one each time it is met."""
    if isinstance(tensor, gs.Variable) and tensor.is_empty():
        return gs.Variable.empty()
    if tensor.name not in by_name:
        by_name[tensor.name] = (
            gs.Constant(tensor.name, np.asarray(tensor.values))
            if isinstance(tensor, gs.Constant)
            else gs.Variable(tensor.name, tensor.dtype)
        )
    return by_name[tensor.name]
