"""Which axis of a tensor counts the step's tokens, and whether a node keeps them apart."""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from llmlab.graph.analysis.row_facts import Rows
from llmlab.graph.analysis.row_rules import RULES, SHAPE_OPERANDS, constant_rows
from llmlab.graph.edit import Dim, constant_expression
from llmlab.graph.graph import LLMLAB_DOMAIN, TOKENS, Graph
from llmlab.graph.operators.functions import inlined

_KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", LLMLAB_DOMAIN, None)


def counts_tokens(dim: Dim) -> bool:
    """Whether an axis of this size has a row, or several that follow each other (`2*T`), for each token."""
    return isinstance(dim, str) and TOKENS in dim.split("*")


def token_axis(tensor: gs.Tensor) -> int | None:
    """The axis of `tensor` that counts tokens, None where no axis does."""
    if isinstance(tensor, gs.Constant) or tensor.shape is None:
        return None
    return next((i for i, d in enumerate(tensor.shape) if counts_tokens(d)), None)


def mixes_tokens(node: gs.Node, sizes: Collection[int] = ()) -> str | None:
    """None where each row of the node's outputs depends on the same row of its inputs alone, else what is in doubt.

    sizes: the ids of tensors whose values depend on how many tokens there are. They may say how large an output is.
    """
    if node.op == "PagedAttention" and node.domain == LLMLAB_DOMAIN:
        return None
    if node.op == "Gather" and node.inputs[1].name == "logits_index":
        return None
    if any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return f"{node.op} holds a graph of its own, which is not looked into"
    unknown = [
        t.name for t in (*node.inputs, *node.outputs) if t.name and t.shape is None and not constant_expression(t)
    ]
    if unknown:
        return f"the shape of {unknown[0]} is not known"
    if any(sum(map(counts_tokens, t.shape or ())) > 1 for t in node.inputs):
        return "it compares tokens with each other"
    axes = tuple(token_axis(t) for t in node.inputs)
    outs = [token_axis(o) for o in node.outputs if o.name]
    if all(a is None for a in axes) and all(o is None for o in outs):
        return None
    if node.op in ("Shape", "Size"):
        return None  # its output is one of `sizes`
    if node.domain not in _KNOWN_DOMAINS or (node.op not in RULES and any(a is not None for a in axes)):
        return f"{node.op} is not known to keep tokens apart"
    if not outs or outs[0] is None:
        return "its output has no token axis"
    if len(set(outs)) > 1:
        return "its outputs count tokens along different axes"
    shaping = SHAPE_OPERANDS.get(node.op, ())
    if any(id(t) in sizes and i not in shaping for i, t in enumerate(node.inputs)):
        return "it depends on the number of tokens in the step"
    if all(a is None for a in axes):
        return constant_rows(node, outs[0])
    return RULES[node.op](Rows(node, axes, outs[0]))


def token_counts(graph: gs.Graph) -> set[int]:
    """The ids of tensors that have no row for each token, but whose values depend on how many tokens there are."""
    sizes: set[int] = set()
    for node in graph.nodes:
        counted = node.op in ("Shape", "Size") and any(
            t.shape is None or any(map(counts_tokens, t.shape)) for t in node.inputs
        )
        if counted and not all(constant_expression(t) for t in node.inputs):
            sizes.update(id(t) for t in node.outputs)
        elif any(id(t) in sizes for t in node.inputs):
            sizes.update(id(t) for t in node.outputs if token_axis(t) is None)
    return sizes


def mixing_node(graph: Graph) -> tuple[gs.Node, str] | None:
    """The first node that may let one token see another outside PagedAttention, and why; None where there is none.

    What only counts tokens (Shape and arithmetic on it) may say how large a tensor is, and reach no token otherwise.
    """
    sizes = token_counts(graph.surgeon)
    for node in graph.surgeon.nodes:
        body = inlined(graph.surgeon, node)
        if (reason := mixes_tokens(node, sizes) if body is None else _body_mixes(node, body, sizes)) is not None:
            return node, reason
        if any(id(out) in sizes and any(out is t for t in graph.surgeon.outputs) for out in node.outputs):
            return node, "its output has no token axis"
    return None


def _body_mixes(node: gs.Node, body: gs.Graph, sizes: Collection[int]) -> str | None:
    """The same question about what a function computes: in it, and of what goes in and comes out."""
    if any(id(t) in sizes for t in node.inputs):
        return "it depends on the number of tokens in the step"
    own = token_counts(body)
    for inner in body.nodes:
        if (reason := mixes_tokens(inner, own)) is not None:
            return f"in its body, {reason} ({inner.op})"
    return "its output counts tokens" if any(id(t) in own for t in body.outputs) else None
