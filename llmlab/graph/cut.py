"""A graph in pieces: cut at chosen nodes, with the tensors that cross from piece to piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import GraphError, InputError
from llmlab.graph.edit import RANDOM, sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.operators.functions import used_functions
from llmlab.graph.pieces import Crossing, Cut, Piece
from llmlab.graph.store.storage import array

_BY_VALUE = 1024  # bytes; integers (axes, sizes) up to here are part of a piece's structure

Predicate = Callable[[gs.Node], bool]


def cut(graph: Graph, at: Predicate) -> Cut:
    """Split `graph` into pieces that run one after another and together compute the same; the graph is not changed.

    at: `at(node)` is True for nodes that become a piece of their own, such as attention for a runtime that launches its
        own kernel there. What lies between two of them is one piece, as large as it can be.

    A tensor that one piece makes and another reads is an output of the first and an input of the second, under its
    name. Weights are shared. Nodes that depend on weights alone go to each piece that reads them.
    Raises InputError for a predicate that can't be used, GraphError for a graph without nodes or where
    the type of a crossing tensor isn't known.
    """
    if not isinstance(graph, Graph):
        raise InputError(f"expected a Graph, got {type(graph).__name__}: export a model first")
    work = graph.copy().surgeon
    sort_nodes(work)
    marked = {id(node) for node in work.nodes if _asks(at, node)}
    groups = _groups(work, marked)
    if not groups:
        raise GraphError("the graph has no nodes: there is nothing to cut")
    home, readers = _homes(groups)
    outputs = {id(t) for t in work.outputs}
    pieces, crossings = [], []
    for i, group in enumerate(groups):
        kept = [t for n in group for t in n.outputs if home[id(t)] == i and (id(t) in readers or id(t) in outputs)]
        for tensor in kept:
            if id(tensor) in readers:
                crossings.append(_crossing(tensor, i, readers[id(tensor)]))
        if i == len(groups) - 1:
            kept += [t for t in work.outputs if isinstance(t, gs.Constant)]
        surgeon = _excerpt(work, group, kept)
        is_marked = id(group[-1]) in marked
        name = group[-1].name if is_marked else f"nodes up to {group[-1].name}"
        pieces.append(Piece(i, name, is_marked, Graph(surgeon, graph.config), structural_key(surgeon)))
    return Cut(tuple(pieces), tuple(crossings), tuple(t.name for t in work.outputs))


def _homes(groups: list[list[gs.Node]]) -> tuple[dict[int, int], dict[int, set[int]]]:
    """By tensor: the group that makes it for others (the last one, of a constant that several make), and its readers
    in other groups."""
    made = [{id(t) for node in group for t in node.outputs} for group in groups]
    home = {tensor: i for i, tensors in enumerate(made) for tensor in tensors}
    readers: dict[int, set[int]] = {}
    for i, group in enumerate(groups):
        for tensor in _reads(group):
            if id(tensor) in home and id(tensor) not in made[i]:
                readers.setdefault(id(tensor), set()).add(i)
    return home, readers


def _crossing(tensor: gs.Tensor, made_by: int, readers: set[int]) -> Crossing:
    if tensor.dtype is None:
        raise GraphError(f"{tensor.name} crosses from one piece to another, and its type isn't known")
    return Crossing(tensor.name, str(np.dtype(tensor.dtype)), tensor.shape, made_by, tuple(sorted(readers)))


def _asks(at: Predicate, node: gs.Node) -> bool:
    if not callable(at):
        raise InputError(f"at is a {type(at).__name__}; expected a function from a node to True or False")
    try:
        answer = at(node)
    except Exception as problem:
        why = " ".join(str(problem).split())
        raise InputError(f"the predicate fails at {node.name}: {type(problem).__name__}: {why}") from problem
    if not isinstance(answer, (bool, np.bool_)):
        raise InputError(f"the predicate gives {answer!r} for {node.name}; expected True or False")
    return bool(answer)


def _groups(graph: gs.Graph, marked: set[int]) -> list[list[gs.Node]]:
    """Nodes by piece, in executable order.

    A node's stage is the number of marked nodes on the longest way to it. The unmarked nodes of a stage run together,
    then its marked ones, which don't depend on each other, one by one. An unmarked node moves to the stage that first
    reads it, so that what one layer alone needs is computed in that layer's piece.
    """
    constant = _constant_nodes(graph, marked)
    nodes = [node for node in graph.nodes if id(node) not in constant]
    stage: dict[int, int] = {}
    ready: dict[int, int] = {}  # by tensor: the first stage that can read it
    for node in nodes:
        stage[id(node)] = max((ready.get(id(t), 0) for t in _reads([node])), default=0)
        ready.update({id(t): stage[id(node)] + (id(node) in marked) for t in node.outputs})
    wanted: dict[int, int] = {}  # by tensor: the first stage that does read it
    for node in reversed(nodes):
        readers = [wanted[id(t)] for t in node.outputs if id(t) in wanted]
        if readers and id(node) not in marked and not any(t is o for t in node.outputs for o in graph.outputs):
            stage[id(node)] = min(readers)
        for tensor in _reads([node]):
            wanted[id(tensor)] = min(stage[id(node)], wanted.get(id(tensor), stage[id(node)]))
    runs: dict[int, list[gs.Node]] = {}
    cuts: dict[int, list[gs.Node]] = {}
    for node in nodes:
        (cuts if id(node) in marked else runs).setdefault(stage[id(node)], []).append(node)
    groups: list[list[gs.Node]] = []
    for at in sorted({*runs, *cuts}):
        groups += [runs[at]] if at in runs else []
        groups += [[node] for node in cuts.get(at, ())]
    if not groups and graph.nodes:  # a graph of constants alone
        return [list(graph.nodes)]
    return _with_constants(graph, groups, constant)


def _constant_nodes(graph: gs.Graph, marked: set[int]) -> set[int]:
    """Nodes that give the same whenever and however often they run: they depend on constants alone."""
    found: set[int] = set()
    for node in graph.nodes:
        fixed = all(isinstance(t, gs.Constant) or (t.inputs and id(t.inputs[0]) in found) for t in _reads([node]))
        if fixed and id(node) not in marked and node.op not in RANDOM:
            found.add(id(node))
    return found


def _with_constants(graph: gs.Graph, groups: list[list[gs.Node]], constant: set[int]) -> list[list[gs.Node]]:
    """Each group with copies of the constant nodes that it reads, in front."""
    made_by = {id(t): node for node in graph.nodes if id(node) in constant for t in node.outputs}
    outputs = [t for t in graph.outputs if id(t) in made_by]
    result = []
    for i, group in enumerate(groups):
        needed: dict[int, gs.Node] = {}
        pending = [*_reads(group), *(outputs if i == len(groups) - 1 else ())]
        while pending:
            node = made_by.get(id(pending.pop()))
            if node is not None and id(node) not in needed:
                needed[id(node)] = node
                pending.extend(_reads([node]))
        result.append([*(n for n in graph.nodes if id(n) in needed), *group])
    return result


def _reads(nodes: list[gs.Node]) -> list[gs.Tensor]:
    """Tensors that `nodes` read, those that their subgraphs capture included, in order and each once."""
    found: dict[int, gs.Tensor] = {}
    for node in nodes:
        captured = [t for sub in node.subgraphs() for t in sub._foreign_tensors().values()]
        found.update({id(t): t for t in (*node.inputs, *captured) if isinstance(t, gs.Constant) or not t.is_empty()})
    return list(found.values())


def _excerpt(graph: gs.Graph, nodes: list[gs.Node], outputs: list[gs.Tensor]) -> gs.Graph:
    """`nodes` as a graph of their own that makes `outputs`. Weights are the same arrays."""
    tensors: dict[str, gs.Tensor] = {}
    for tensor in (*_reads(nodes), *(t for node in nodes for t in node.outputs), *outputs):
        if tensor.name and tensor.name not in tensors:
            tensors[tensor.name] = tensor.copy()

    def own(tensor: gs.Tensor) -> gs.Tensor:
        return tensors[tensor.name] if tensor.name else gs.Variable.empty()

    copies = [node.copy([own(t) for t in node.inputs], [own(t) for t in node.outputs], tensors) for node in nodes]
    made = {t.name for node in nodes for t in node.outputs}
    inputs = [t for t in tensors.values() if isinstance(t, gs.Variable) and t.name not in made]
    return gs.Graph(
        copies,
        inputs,
        [own(t) for t in outputs],
        name=graph.name,
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=used_functions(graph, nodes),
    )


def structural_key(graph: gs.Graph) -> str:
    """Equal for graphs that differ in names and weight values alone, so that one build or timing cache serves both.

    Weights count by shape and type, scalars and small integers (axes, sizes) by value. Inputs, outputs and weights of
    two graphs with the same key correspond to each other in order.
    """
    numbers: dict[int, int] = {}
    parts: list[str] = []

    def number(tensor: gs.Tensor) -> str:
        if isinstance(tensor, gs.Variable) and tensor.is_empty():
            return "-"
        if id(tensor) in numbers:
            return str(numbers[id(tensor)])
        numbers[id(tensor)] = len(numbers)
        return f"{len(numbers) - 1}{_describe(tensor)}"

    parts.append(",".join(number(t) for t in graph.inputs))
    for node in graph.nodes:
        attrs = sorted(
            (k, _describe(v) if isinstance(v, gs.Constant) else _attribute(v)) for k, v in node.attrs.items()
        )
        reads = ",".join(number(t) for t in _reads([node])) if any(node.subgraphs()) else ""
        inputs, outputs = (",".join(number(t) for t in side) for side in (node.inputs, node.outputs))
        parts.append(f"{node.domain or ''}::{node.op}{attrs}({inputs};{reads})->({outputs})")
    parts.append(",".join(number(t) for t in graph.outputs))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _attribute(value: Any) -> str:
    return structural_key(value) if isinstance(value, gs.Graph) else str(value)


def _describe(tensor: gs.Tensor) -> str:
    text = f":{tensor.dtype}{tensor.shape}"
    if not isinstance(tensor, gs.Constant):
        return text
    by_value = tensor._values.nbytes <= _BY_VALUE if np.dtype(tensor.dtype).kind in "iub" else not tensor.shape
    return f"{text}={np.asarray(array(tensor)).tolist()}" if by_value else text
