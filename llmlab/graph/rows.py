"""Which axis of a tensor counts the step's tokens, and whether a node keeps them apart."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.edit import constant_expression, ints, operand
from llmlab.graph.functions import inlined
from llmlab.graph.graph import Graph
from llmlab.graph.passes.drop_batch_axis import ELEMENTWISE
from llmlab.graph.passes.pack_tokens import TOKENS

_ALONG = {
    "Softmax": -1,
    "LogSoftmax": -1,
    "RMSNormalization": -1,
    "LayerNormalization": -1,
    "TopK": -1,
    "GatherElements": 0,
    "ScatterElements": 0,
    "Concat": None,
    "Split": 0,
    "GatedActivation": -1,
}
_NORMS = frozenset(("RMSNormalization", "LayerNormalization"))
_REDUCE = frozenset(
    (
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceSumSquare",
        "ReduceL2",
        "Slice",
        "Squeeze",
        "Unsqueeze",
    )
)


def token_axis(tensor: gs.Tensor) -> int | None:
    """The axis of `tensor` that counts tokens, or several rows of each (`2*T`), None where no axis does."""
    if isinstance(tensor, gs.Constant) or tensor.shape is None:
        return None
    return next((i for i, d in enumerate(tensor.shape) if isinstance(d, str) and TOKENS in d.split("*")), None)


def mixes_tokens(node: gs.Node) -> str | None:
    """None where each row of the node's outputs depends on the same row of its inputs alone, else what is in doubt."""
    if node.op == "PagedAttention" or (node.op == "Gather" and node.inputs[1].name == "logits_index"):
        return None
    unknown = [
        t.name for t in (*node.inputs, *node.outputs) if t.name and t.shape is None and not constant_expression(t)
    ]
    if unknown:
        return f"the shape of {unknown[0]} is not known"
    axes = [token_axis(t) for t in node.inputs]
    if all(a is None for a in axes) and all(token_axis(o) is None for o in node.outputs):
        return None
    out_axis, rank = token_axis(node.outputs[0]), len(node.outputs[0].shape or ())
    if out_axis is None:
        return "its output has no token axis"
    if node.op in ELEMENTWISE:
        from_end = {a - len(t.shape) for t, a in zip(node.inputs, axes, strict=True) if a is not None}
        return None if from_end == {out_axis - rank} else "its inputs count tokens along different axes"
    axis = axes[0]
    if node.op in ("MatMul", "Gemm"):
        return _product(node, axes, out_axis - rank)
    if node.op == "Gather":
        looked_up = axes[0] is None and axes[1] is not None and node.attrs.get("axis", 0) == 0
        return None if looked_up else "it picks among tokens"
    if node.op == "Transpose":
        perm = list(node.attrs.get("perm", ()))
        return (
            None
            if axis is not None and perm and perm[out_axis] == axis
            else "it moves the token axis in an unknown way"
        )
    if node.op == "Reshape":
        return _reshape(node, axis, out_axis)
    if node.op in ("RotaryEmbedding", "MixtureOfExperts"):
        return None
    if node.op == "GatherND":
        looked_up = axes[0] is None and axes[1] == out_axis and axes[1] != len(node.inputs[1].shape) - 1
        return None if looked_up else "it picks among tokens"
    if node.op == "Expand":
        same = axis is not None and axis - len(node.inputs[0].shape) == out_axis - rank
        return None if same else "it repeats tokens along an axis of theirs"
    if node.op in _ALONG:
        along = node.attrs.get("axis", _ALONG[node.op])
        along = None if along is None else along % rank
        if node.op in _NORMS and along is not None and along < out_axis:
            return "it works along the token axis"  # it takes all axes from there on
        return (
            None
            if along is not None and along != out_axis and all(a in (None, out_axis) for a in axes)
            else "it works along the token axis"
        )
    if node.op in _REDUCE:
        at = 3 if node.op == "Slice" else 1
        touched = ints(operand(node, at))
        base = len(node.inputs[0].shape) if node.op != "Unsqueeze" else rank
        if touched is None:
            return "its axes are computed"
        limit = out_axis if node.op == "Unsqueeze" else axis
        return "it works along the token axis" if limit in [a % base for a in touched] else None
    return f"{node.op} is not known to keep tokens apart"


def _product(node: gs.Node, axes: list[int | None], from_end: int) -> str | None:
    """Tokens are rows of the left side, and the right side is a weight, or the token's own matrix in a batch of them."""
    mixed = "it multiplies tokens with each other"
    if axes[0] is None or node.attrs.get("transA"):
        return mixed
    left = axes[0] - len(node.inputs[0].shape)
    if axes[1] is None:
        plain = left < -1 and constant_expression(node.inputs[1])
        bias = all(t is None or constant_expression(t) for t in [operand(node, 2)])
        return None if plain and bias else mixed
    right = axes[1] - len(node.inputs[1].shape)
    return None if node.op == "MatMul" and left == right == from_end and left < -2 else mixed


def _reshape(node: gs.Node, axis: int | None, out_axis: int) -> str | None:
    """Rows stay rows where the sizes before the token axis multiply to the same on both sides."""

    def before(shape: list, end: int) -> int | None:
        total = 1
        for dim in shape[:end]:
            if not isinstance(dim, int):
                return None
            total *= dim
        return total

    if axis is None:
        return "its input has no token axis"
    a, b = before(node.inputs[0].shape, axis), before(node.outputs[0].shape, out_axis)
    return None if a is not None and a == b else "it may mix tokens with another axis"


def mixing_node(graph: Graph) -> tuple[gs.Node, str] | None:
    """The first node that may let one token see another outside PagedAttention, and why; None where there is none."""
    for node in graph.surgeon.nodes:
        body = inlined(graph.surgeon, node)
        if (reason := mixes_tokens(node) if body is None else _body_mixes(body)) is not None:
            return node, reason
    return None


def _body_mixes(body: gs.Graph) -> str | None:
    """The same question about what a function computes."""
    for node in body.nodes:
        if (reason := mixes_tokens(node)) is not None:
            return f"in its body, {reason} ({node.op})"
    return None
