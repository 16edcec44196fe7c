"""The weights of a serving graph that can be quantized, by name: what each is called, what it does, and where it is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError, nearest
from llmlab.graph.edit import constant_expression, producer, scope
from llmlab.graph.graph import Graph
from llmlab.graph.linear import is_embedding, linear
from llmlab.graph.lower.weights import evaluate
from llmlab.graph.quantized import quantized
from llmlab.graph.reports.fold import layer_of

SMALL = 16
"""A product of fewer outputs than this has the role `small`: gates of single numbers, which cost nothing and decide much."""
_ROLES = {
    "q": "q_proj query q_lin wq w_q q",
    "k": "k_proj key k_lin wk w_k k",
    "v": "v_proj value v_lin wv w_v v",
    "qkv": "qkv_proj query_key_value c_attn wqkv qkv qkv_lin linear_qkv attn_qkv",
    "o": "o_proj out_proj out_lin wo attn_out linear_proj attention_output",
    "gate": "gate_proj w1 linear_v",
    "up": "up_proj fc1 c_fc dense_h_to_4h fc_in w3 lin1 linear_fc1 w_in intermediate",
    "gate_up": "gate_up_proj gate_and_up_proj w12 input_linear",
    "down": "down_proj fc2 dense_4h_to_h fc_out w2 lin2 linear_fc2 w_out output_linear",
}
_BY_NAME = {name: role for role, names in _ROLES.items() for name in names.split()}
_AMBIGUOUS = {"c_proj", "dense", "proj"}  # the end of attention, or of an MLP
ROLES = (*_ROLES, "expert_up", "expert_down", "linear", "head", "router", "embedding", "small")
"""What a projection does. expert_up and expert_down: all experts of a layer; linear: none of the others."""
_WEIGHT = re.compile(r"\.(weight|kernel)(\.|$)")


@dataclass(frozen=True, eq=False)
class Projection:
    """A weight and the node that multiplies by it.

    name: the module's, such as `model.layers.0.self_attn.q_proj`. layer: its number, None outside of layers. role: one of ROLES.
    node: the MatMul (of several projections, where products are merged), Gather or MixtureOfExperts. input: what it multiplies
    [T, K], or looks up. weight: the stored tensor, [N, K] where `transposed` and else [K, N]; of experts, [E, N, K] and [E, K, N].
    reader, index: the node, and which of its inputs, that reads `weight`; a tied weight has others, too.
    """

    name: str
    layer: int | None
    role: str
    node: gs.Node
    input: gs.Tensor
    weight: gs.Tensor
    transposed: bool
    reader: gs.Node
    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): how many numbers come out and how many go in. The rows of experts lie one after another."""
        shape = [int(d) for d in self.weight.shape]
        rows, depth = shape[-2:] if self.transposed else shape[:-3:-1]
        return rows * int(np.prod(shape[:-2], dtype=np.int64)), depth

    @property
    def is_quantized(self) -> bool:
        return quantized(self.reader.inputs[self.index]) is not None

    def load(self) -> np.ndarray:
        """The weight as float32 [N, K]: computed, not kept; what a quantized one stands for."""
        found = quantized(self.weight)
        values = evaluate(self.weight) if found is None else found.dequantize()
        return rows_of(values, self.transposed).astype(np.float32)


def rows_of(values: np.ndarray, transposed: bool) -> np.ndarray:
    """A weight as it is stored → [N, K]."""
    turned = values if transposed else np.swapaxes(values, -1, -2)
    return turned.reshape(-1, turned.shape[-1])


def projections(graph: Graph) -> list[Projection]:
    """Every product with a weight, expert and embedding of a serving graph, in its order; each has a name of its own.

    Products that were merged are listed one by one.
    """
    if not isinstance(graph, Graph) or graph.kind != "serving":
        raise InputError("expected a serving graph: pass what llmlab.optimize returned")
    head = _head(graph)
    found: list[Projection] = []
    names: set[str] = set()
    for node in graph.surgeon.nodes:
        for name, role, weight, transposed, reader, index in _weights(graph, node, node is head):
            unique, count = name, 1
            while unique in names:
                unique, count = f"{name}.{count}", count + 1
            names.add(unique)
            number = re.search(r"\.(\d+)$", layer_of(unique))
            layer = int(number[1]) if number and role not in ("head", "embedding") else None
            given = node.inputs[1 if role == "embedding" else 0]
            found.append(Projection(unique, layer, role, node, given, weight, transposed, reader, index))
    return found


def select(given: Sequence[Projection], pattern: str) -> list[Projection]:
    """The projections whose name or role `pattern` matches; `*` and `?` are wildcards. Raises InputError, with the nearest names,
    where there is none."""
    if chosen := [p for p in given if matches(p, pattern)]:
        return chosen
    known = {p.name for p in given} | {p.role for p in given}
    known |= {f"*.{p.name.rpartition('.')[2]}" for p in given if "." in p.name}
    raise InputError(f"no projection matches {pattern!r}; {nearest(pattern, known)}")


def matches(projection: Projection, pattern: str) -> bool:
    return pattern == projection.role or fnmatchcase(projection.name, pattern)


_Found = tuple[str, str, gs.Tensor, bool, gs.Node, int]


def _weights(graph: Graph, node: gs.Node, is_head: bool) -> Iterator[_Found]:
    """(name, role, weight, whether it is stored [N, K], who reads it and as which input) of what `node` multiplies by."""
    if is_embedding(node, graph.config.hidden_size):
        yield _name(node.inputs[0]) or scope(node), "embedding", node.inputs[0], True, node, 0
    elif node.op == "MixtureOfExperts":
        for index, role in ((3, "expert_up"), (4, "expert_down")):
            weight = node.inputs[index]
            if constant_expression(weight):
                name = _name(weight) or f"{scope(node)}.{role}"
                yield name, role, weight, not node.attrs["transposed"], node, index
    elif (layer := linear(node)) is not None:
        join = producer(layer.weight, "Concat")
        if join is None:
            turn = producer(node.inputs[1], "Transpose") if layer.transposed else None
            name = scope(node) or _name(layer.weight) or node.name
            role = "head" if is_head else _role(name, node, layer.width)
            yield name, role, layer.weight, layer.transposed, turn or node, 0 if turn else 1
            return
        for index, weight in enumerate(join.inputs):
            name = _name(weight) or f"{scope(node)}.{index}"
            width = int(weight.shape[0 if layer.transposed else 1])
            yield name, _role(name, node, width), weight, layer.transposed, join, index


def _name(weight: gs.Tensor) -> str:
    """The module whose weight it is, from the name of its only constant; empty where that says nothing."""
    pending, names = [weight], set()
    while pending:
        tensor = pending.pop()
        if isinstance(tensor, gs.Constant):
            names.add(tensor.name)
        elif (found := quantized(tensor)) is not None:
            names.add(found.values.name)
        else:
            pending.extend(tensor.inputs[0].inputs)
    found_names = [name[: mark.start()] for name in names if (mark := _WEIGHT.search(name))]
    return found_names[0] if len(found_names) == 1 else ""


def _role(name: str, node: gs.Node, width: int) -> str:
    if _leads_to_choice(node):
        return "router"
    if width < SMALL:
        return "small"
    *path, last = name.lower().split(".")
    if last in _AMBIGUOUS:
        return "o" if any("att" in part for part in path[-1:]) else "down" if path else "linear"
    return _BY_NAME.get(last, "linear")


def _head(graph: Graph) -> gs.Node | None:
    """The product that makes the logits."""
    tensor = next((t for t in graph.surgeon.outputs if t.name == "logits"), None)
    seen = 0
    while tensor is not None and (node := producer(tensor)) is not None and seen < 64:
        if node.op == "MatMul":
            return node
        live = [
            t for t in node.inputs if not constant_expression(t) and not (isinstance(t, gs.Variable) and t.is_empty())
        ]
        tensor, seen = (live[0] if live else None), seen + 1
    return None


def _leads_to_choice(node: gs.Node) -> bool:
    """Whether what `node` computes decides, before any other product, which experts are used."""
    seen: set[int] = set()
    pending: list[gs.Node] = _readers([node])
    while pending:
        reader = pending.pop()
        if reader.op == "TopK":
            return True
        if id(reader) not in seen and reader.op not in ("MatMul", "PagedAttention", "MixtureOfExperts"):
            seen.add(id(reader))
            pending.extend(_readers([reader]))
    return False


def _readers(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    return [reader for node in nodes for out in node.outputs for reader in out.outputs]
