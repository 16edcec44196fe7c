"""The spellings of a norm over the last axis: what squares, averages, takes the root, divides and weighs, in any order
that gives the same numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, ints, operand, other, producer, scalar, scope, value
from llmlab.graph.rewrite import Match

FLOATS = frozenset(("float16", "bfloat16", "float32", "float64"))


class Result(NamedTuple):
    """A tensor that is the norm times `weight` [width] (None: times one), the norm being first rounded to `dtype`."""

    out: gs.Tensor
    weight: gs.Tensor | None
    dtype: np.dtype


def squared(mean: gs.Node) -> gs.Tensor | None:
    """d where `mean` averages d², else None."""
    if mean.op != "ReduceMean":
        return None
    square = producer(uncast(mean.inputs[0]), "Pow", "Mul")
    if square is None:
        return None
    twice = scalar(square.inputs[1]) == 2.0 if square.op == "Pow" else square.inputs[0] is square.inputs[1]
    return square.inputs[0] if twice else None


def over_last_axis(mean: gs.Node) -> bool:
    rank = len(mean.inputs[0].shape or ())
    return ints(operand(mean, 1)) in ([-1], [rank - 1]) and mean.attrs.get("keepdims", 1) == 1


def uncast(tensor: gs.Tensor) -> gs.Tensor:
    """What `tensor` was before it was cast between types of floats."""
    while (node := producer(tensor, "Cast")) is not None and _is_float(tensor) and _is_float(node.inputs[0]):
        tensor = node.inputs[0]
    return tensor


def normalised(edit: Editor, match: Match, mean: gs.Node, d: gs.Tensor) -> str | None:
    """Follow `mean`, the average of d², to where d is divided by its root; None, or what is in the way.

    Leaves in `match`: `epsilon`, and `results`, the tensors that the whole norm gives.
    """
    add = _reader(mean.outputs[0], "Add")
    epsilon = scalar(uncast(other(add[0], add[1]))) if add is not None else None
    if add is None or epsilon is None:
        return "no constant ε is added to the mean"
    tensor, exponent = add[0].outputs[0], 1.0
    while (step := _root(tensor)) is not None:
        tensor, exponent = step[0], exponent * step[1]
    scaled = _reader(tensor, "Mul", "Div")
    if scaled is None or (scaled[0].op, exponent) not in (("Mul", -0.5), ("Div", 0.5)):
        return "mean + ε is not used as x / sqrt(·)"
    node, root = scaled
    if node.op == "Div" and node.inputs[1] is not root:
        return "mean + ε is not used as x / sqrt(·)"
    over, width = other(node, root), _width(d)
    if width is None:
        return f"the width of {d.name} is not known"
    weight = None
    if uncast(over) is not uncast(d):
        product = producer(over, "Mul")  # x · w, before the division
        weight = next((t for t in product.inputs if fits(t, width)), None) if product is not None else None
        if product is None or weight is None or uncast(other(product, weight)) is not uncast(d):
            return f"what mean + ε divides is not {d.name}"
    match.epsilon, out = epsilon, node.outputs[0]
    if weight is not None:
        match.results = [Result(out, weight, np.dtype(out.dtype))]
    else:
        match.results = _weighted(edit, out, width)
    known = {np.dtype(t.dtype) for t in (match.x, uncast(match.x))}
    if odd := next((r.dtype for r in match.results if r.dtype not in known), None):
        return f"it is rounded to {odd} before it is weighed"
    return None


def _weighted(edit: Editor, out: gs.Tensor, width: int) -> list[Result]:
    """Each product of `out` with a constant weight, through a Cast or not, and `out` itself if it is read otherwise."""
    results: list[Result] = []
    bare = edit.is_output(out) or not out.outputs
    for node in out.outputs:
        cast = node.outputs[0] if node.op == "Cast" and _is_float(node.outputs[0]) else None
        tensor, readers = (out, [node]) if cast is None else (cast, cast.outputs)
        products = [r for r in readers if r.op == "Mul" and fits(other(r, tensor), width)]
        results += [Result(r.outputs[0], other(r, tensor), np.dtype(tensor.dtype)) for r in products]
        bare |= len(products) < max(len(readers), 1) or edit.is_output(tensor)
    return [*results, Result(out, None, np.dtype(out.dtype))] if bare else results


def fits(tensor: gs.Tensor, width: int) -> bool:
    """Whether `tensor` is a constant vector of `width`; axes of one in front of it don't count."""
    shape = list(tensor.shape or ())
    return bool(shape) and constant_expression(tensor) and shape[-1] == width and all(n == 1 for n in shape[:-1])


def vector(edit: Editor, tensor: gs.Tensor) -> gs.Tensor:
    """`tensor`, which `fits`, with one axis."""
    if len(tensor.shape) == 1:
        return tensor
    array = value(tensor)
    if array is not None:
        return edit.constant(tensor.name, array.reshape(-1))
    shape = edit.constant(f"{tensor.name}/vector", np.array([-1], np.int64))
    where = scope(tensor.inputs[0]) if tensor.inputs else ""
    return edit.add("Reshape", where, [tensor, shape], dtype=tensor.dtype, shape=[tensor.shape[-1]])


def fuse(edit: Editor, match: Match, op: str, x: gs.Tensor, result: Result, bias: gs.Tensor | None = None) -> None:
    """Let one `op` node compute `result` of `x`, in the type in which the norm was weighed."""
    narrow = uncast(x)
    x = narrow if np.dtype(narrow.dtype) == result.dtype else x
    weight = (
        vector(edit, result.weight)
        if result.weight is not None
        else edit.constant(f"{match.node.name}/ones", np.ones(int(x.shape[-1]), result.dtype))
    )
    attrs: dict[str, Any] = {"axis": -1, "epsilon": match.epsilon}
    inputs = [x, weight, None if bias is None else vector(edit, bias)]
    fused = edit.add(op, scope(match.node), inputs, attrs, dtype=result.out.dtype, shape=x.shape)
    edit.replace(result.out, fused)


def _root(tensor: gs.Tensor) -> tuple[gs.Tensor, float] | None:
    """The next step of a root or an inverse and the power that it takes, if the one reader of `tensor` is one."""
    if len(tensor.outputs) != 1:
        return None
    node = tensor.outputs[0]
    out = node.outputs[0]
    if node.op == "Cast" and _is_float(out):
        return out, 1.0
    if node.op == "Sqrt":
        return out, 0.5
    if node.op == "Reciprocal" or (node.op == "Div" and node.inputs[1] is tensor and scalar(node.inputs[0]) == 1.0):
        return out, -1.0
    if node.op == "Pow" and node.inputs[0] is tensor and (power := scalar(node.inputs[1])) is not None:
        return out, power
    return None


def _reader(tensor: gs.Tensor, *ops: str) -> tuple[gs.Node, gs.Tensor] | None:
    """The one reader of `tensor`, through a Cast or not, if it is one of `ops`, and the tensor that it reads."""
    while len(tensor.outputs) == 1 and tensor.outputs[0].op == "Cast" and _is_float(tensor.outputs[0].outputs[0]):
        tensor = tensor.outputs[0].outputs[0]
    return (tensor.outputs[0], tensor) if len(tensor.outputs) == 1 and tensor.outputs[0].op in ops else None


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).name in FLOATS


def _width(tensor: gs.Tensor) -> int | None:
    last = tensor.shape[-1] if tensor.shape else None
    return last if isinstance(last, int) else None
