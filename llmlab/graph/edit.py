"""Small tools of surgery: walk from tensor to node and back, read constants, add nodes with unique names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.errors import GraphError
from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import loaded

Dim = int | str | None
RANDOM = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
"""Operators that give something else each time they run."""


def producer(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """The node that makes `tensor`, if there is one and it is one of `ops` (any, where none are given)."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs:
        return None
    node = tensor.inputs[0]
    return node if not ops or node.op in ops else None


def value(tensor: gs.Tensor | None, limit: int = 1 << 20) -> np.ndarray | None:
    """A constant's array (None for a variable, an omitted input, or one of more than `limit` bytes)."""
    if not isinstance(tensor, gs.Constant) or tensor._values.nbytes > limit:
        return None
    return np.asarray(loaded(tensor._values))  # the surgeon's `values` would keep what was only deferred


def scalar(tensor: gs.Tensor | None) -> float | None:
    """The value of a one-element constant, else None."""
    array = value(tensor)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def ints(tensor: gs.Tensor | None) -> list[int] | None:
    """The values of a small integer constant as a flat list, else None."""
    array = value(tensor)
    return [int(v) for v in array.reshape(-1)] if array is not None and array.dtype.kind in "iu" else None


def operand(node: gs.Node, index: int) -> gs.Tensor | None:
    """Input `index` of `node`, None where it is absent or omitted (an empty name)."""
    if index >= len(node.inputs):
        return None
    tensor = node.inputs[index]
    return None if isinstance(tensor, gs.Variable) and tensor.is_empty() else tensor


def is_bfloat16(tensor: gs.Tensor) -> bool:
    """Whether a tensor is in bfloat16, which NumPy has no type for: the surgeon keeps ONNX's number of it."""
    return (
        tensor.dtype == onnx.TensorProto.BFLOAT16 if isinstance(tensor.dtype, int) else str(tensor.dtype) == "bfloat16"
    )


def other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """The other operand of a binary node."""
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def constant_expression(tensor: gs.Tensor | None, limit: int = 64) -> bool:
    """Whether `tensor` depends on constants alone, such as a transposed or widened weight."""
    if tensor is None:
        return False
    pending, seen = [tensor], 0
    while pending:
        current = pending.pop()
        if isinstance(current, gs.Constant):
            continue
        seen += 1
        if not current.inputs or seen > limit:
            return False
        pending.extend(t for t in current.inputs[0].inputs if not (isinstance(t, gs.Variable) and t.is_empty()))
    return True


def ancestors(tensor: gs.Tensor) -> tuple[list[gs.Node], set[str]]:
    """All nodes that `tensor` depends on, and the names of the variables that no node makes (the graph's inputs)."""
    nodes: dict[int, gs.Node] = {}
    sources: set[str] = set()
    pending = [tensor]
    while pending:
        current = pending.pop()
        if isinstance(current, gs.Constant) or not current.name:
            continue
        if not current.inputs:
            sources.add(current.name)
        elif id(current.inputs[0]) not in nodes:
            nodes[id(current.inputs[0])] = current.inputs[0]
            pending.extend(current.inputs[0].inputs)
    return list(nodes.values()), sources


def sort_nodes(surgeon: gs.Graph) -> gs.Graph:
    """Put every node behind those that it reads from, otherwise in the order that they are in; in place.

    The surgeon's own toposort recurses, which a graph of a few hundred nodes appended in a row is too deep for.
    """
    own = {id(n) for n in surgeon.nodes}
    sorted_nodes: list[gs.Node] = []
    state: dict[int, bool] = {}  # False: met, True: placed
    pending = list(reversed(surgeon.nodes))
    while pending:
        node = pending[-1]
        if state.get(id(node)) is None:
            state[id(node)] = False
            made = [producer(t) for t in _read_by(node)]
            before = [p for p in made if p is not None and id(p) in own and not state.get(id(p))]
            if any(id(p) in state for p in before):
                raise GraphError(f"{node.name} depends on itself: a pass made a cycle")
            pending.extend(reversed(before))
            continue
        pending.pop()
        if not state[id(node)]:
            state[id(node)] = True
            sorted_nodes.append(node)
    surgeon.nodes[:] = sorted_nodes
    return surgeon


def _read_by(node: gs.Node) -> Iterator[gs.Tensor]:
    """What a node reads, its subgraphs' nodes included."""
    yield from node.inputs
    for graph in node.attrs.values():
        if isinstance(graph, gs.Graph):
            for inner in graph.nodes:
                yield from _read_by(inner)


def scope(node: gs.Node) -> str:
    """The module that a node came from."""
    return node.name.rpartition("/")[0]


def inline_constants(graph: gs.Graph) -> None:
    """Constant nodes in all their spellings become constants."""
    for node in graph.nodes:
        if node.op != "Constant" or len(node.attrs) != 1:
            continue
        key, given = next(iter(node.attrs.items()))
        if isinstance(given, gs.Constant):
            array = np.asarray(given.values)
        elif key in ("value_int", "value_ints"):
            array = np.asarray(given, np.int64)
        elif key in ("value_float", "value_floats"):
            array = np.asarray(given, np.float32)
        else:
            continue
        out = node.outputs[0]
        node.outputs.clear()
        out.to_constant(array)


class Editor:
    """Adds nodes to one graph under unique names, and rewires it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.surgeon: gs.Graph = graph.surgeon
        self._names = {n.name for n in self.surgeon.nodes} | set(self.surgeon.tensors())

    def name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def constant(self, name: str, array: np.ndarray) -> gs.Constant:
        return gs.Constant(self.name(name), np.asarray(array))

    def add(
        self,
        op: str,
        where: str,
        inputs: Sequence[gs.Tensor | None],
        attrs: dict[str, Any] | None = None,
        *,
        dtype: Any,
        shape: Sequence[Dim] | None,
        domain: str | None = None,
    ) -> gs.Variable:
        """Add a node with one output in module `where`, and return that output."""
        return self.add_many(op, where, inputs, attrs, [(dtype, shape)], domain=domain)[0]

    def add_many(
        self,
        op: str,
        where: str,
        inputs: Sequence[gs.Tensor | None],
        attrs: dict[str, Any] | None,
        outputs: Iterable[tuple[Any, Sequence[Dim] | None]],
        *,
        domain: str | None = None,
    ) -> list[gs.Variable]:
        """Add a node with an output of each (dtype, shape), and return the outputs."""
        name = self.name(f"{where}/{op}")
        made = [
            gs.Variable(self.name(f"{name}:{i}"), dtype, None if shape is None else list(shape))
            for i, (dtype, shape) in enumerate(outputs)
        ]
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = [gs.Variable.empty() if t is None else t for t in inputs]
        self.surgeon.nodes.append(gs.Node(op, name, dict(attrs or {}), given, made, domain=domain))
        return made

    def replace(self, old: gs.Tensor, new: gs.Tensor, *, only: Iterable[gs.Node] | None = None) -> None:
        """Let every consumer of `old` (or `only` these) and, unless `only` is given, the graph's outputs read `new`."""
        if isinstance(new, gs.Variable) and isinstance(old, gs.Variable):
            self.graph.stands_for[new.name] = old.name
        for node in list(old.outputs) if only is None else list(only):
            if node is not producer(new):
                node.inputs = [new if t is old else t for t in node.inputs]
        if only is None and any(t is old for t in self.surgeon.outputs):
            self.surgeon.outputs = [new if t is old else t for t in self.surgeon.outputs]
            if isinstance(new, gs.Variable):
                old.name, new.name = self.name(f"{old.name}.before"), old.name
                new.dtype = old.dtype if new.dtype is None else new.dtype

    def is_output(self, tensor: gs.Tensor) -> bool:
        return any(t is tensor for t in self.surgeon.outputs)
