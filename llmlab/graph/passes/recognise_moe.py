"""Mixtures of experts: products with weights that were gathered for every token give way to one node."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.bounded import CannotEvaluate
from llmlab.graph.analysis.evaluate import excerpt
from llmlab.graph.analysis.operator_kinds import ELEMENTWISE
from llmlab.graph.edit import Editor, constant_expression, ints, operand, other, producer, scalar, scope
from llmlab.graph.graph import LLMLAB_DOMAIN
from llmlab.graph.rewrite import Match, Pass
from llmlab.kernels.experts import ACTIVATIONS, gated

_BETWEEN = ELEMENTWISE | {"Split", "Slice"}  # what a gate may consist of
_ROWS = 32  # of random numbers that a gate is recognised by
_SPREAD = 8.0  # and how far they reach, so that clipping shows


class Experts(NamedTuple):
    """A product of each row with the matrix of the expert chosen for it."""

    x: gs.Tensor  # [S, in]
    weight: gs.Tensor  # [E, out, in], or [E, in, out] where transposed
    bias: gs.Tensor | None  # [E, out]
    choice: gs.Tensor  # [S]
    transposed: bool


class Gate(NamedTuple):
    """What lies between the two products: `nodes` that make their input's columns of `source`, with `numbers` among them."""

    up: Experts
    source: gs.Tensor  # [S, 2 · inner]
    nodes: list[gs.Node]
    numbers: list[float]


class RecogniseMoE(Pass):
    """Gathered expert weights, two batched products and their gate → MixtureOfExperts; routing stays as it is."""

    name = "recognise_moe"

    def pattern(self, node: gs.Node) -> Match | None:
        """The sum over each token's choices of weight · expert(x), as torch's batched products are written."""
        spread = producer(node.inputs[0], "Reshape") if node.op == "ReduceSum" else None
        weighted = producer(spread.inputs[0], "Mul") if spread is not None else None
        for factor in weighted.inputs if weighted is not None else ():
            down = experts_product(other(weighted, factor))
            if down is not None:
                return Match(node=node, spread=spread, factor=factor, down=down)
        return None

    def check(self, edit: Editor, match: Match) -> str | None:
        down: Experts = match.down
        axes, summed = ints(operand(match.node, 1)), match.spread.outputs[0].shape
        if axes not in ([1], [-2]) or match.node.attrs.get("keepdims", 1) or summed is None or len(summed) != 3:
            return "the sum does not run over the middle one of three axes"
        match.k = summed[1]
        match.index, match.weight = _per_token(down.choice, match.k), _per_token(match.factor, match.k)
        if match.index is None:
            return "the experts' numbers are not a flattened [tokens, k]"
        if match.weight is None:
            return "the routing weights are not a flattened [tokens, k]"
        found = _gate(down.x)
        if isinstance(found, str):
            return found
        up = found.up
        if up.choice is not down.choice or up.transposed != down.transposed:
            return "the two products choose their experts differently"
        match.up, match.x = up, _repeated(up.x, match.k)
        if match.x is None:
            return "its input is not each token's row repeated k times"
        match.gate = _recognise(down.x, found)
        if match.gate is None:
            return f"the gate between the products ({', '.join(sorted({n.op for n in found.nodes}))}) is none that is known"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        up, down, old = match.up, match.down, match.node.outputs[0]
        inputs = [match.x, match.index, match.weight, up.weight, down.weight, up.bias, down.bias]
        attrs = {**match.gate, "transposed": int(up.transposed)}
        new = edit.add(
            "MixtureOfExperts",
            scope(match.node),
            inputs,
            attrs,
            dtype=old.dtype,
            shape=old.shape,
            domain=LLMLAB_DOMAIN,
        )
        edit.replace(old, new)


def experts_product(tensor: gs.Tensor) -> Experts | None:
    """The product that makes `tensor` [S, out], where its matrix is looked up for every row."""
    bias = chosen = None
    add = producer(tensor, "Add")
    if add is not None:
        for side in add.inputs:
            if (found := _looked_up(side)) is not None:
                bias, chosen = found
                tensor = other(add, side)
                break
    squeeze = producer(tensor, "Squeeze")
    matmul = producer(squeeze.inputs[0], "MatMul") if squeeze is not None else None
    if matmul is None or squeeze is None:
        return None
    for side, transposed in ((0, False), (1, True)):
        found, row = _looked_up(matmul.inputs[side]), producer(matmul.inputs[1 - side], "Unsqueeze")
        if found is None or row is None or len(found[0].shape or ()) != 3 or len(row.inputs[0].shape or ()) != 2:
            continue
        weight, choice = found
        axis = 1 if transposed else 2
        if chosen is not None and chosen is not choice:
            return None
        if ints(operand(squeeze, 1)) in ([axis], [axis - 3]) and ints(operand(row, 1)) in ([axis], [axis - 3]):
            return Experts(row.inputs[0], weight, bias, choice, transposed)
    return None


def _looked_up(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """(table, choice [S]) where `tensor` is row choice[s] of a constant table for every s."""
    node = producer(tensor, "Gather", "GatherND")
    if node is None or not constant_expression(node.inputs[0]):
        return None
    choice = node.inputs[1]
    if node.op == "GatherND":
        joined = producer(choice, "Concat")
        if joined is not None and len(joined.inputs) == 1:
            choice = joined.inputs[0]
        column = producer(choice, "Unsqueeze")
        if node.attrs.get("batch_dims") or column is None or ints(operand(column, 1)) not in ([1], [-1]):
            return None
        choice = column.inputs[0]
    elif node.attrs.get("axis", 0) != 0:
        return None
    return (node.inputs[0], choice) if len(choice.shape or ()) == 1 else None


def _per_token(tensor: gs.Tensor, k: Any) -> gs.Tensor | None:
    """The [tokens, k] that `tensor` ([S] or [S, 1]) is the flattened form of."""
    column = producer(tensor, "Unsqueeze")
    if column is not None and len(column.inputs[0].shape or ()) == 1:
        tensor = column.inputs[0]
    flat = producer(tensor, "Reshape")
    shape = flat.inputs[0].shape if flat is not None else None
    return flat.inputs[0] if flat is not None and shape is not None and len(shape) == 2 and shape[1] == k else None


def _repeated(tensor: gs.Tensor, k: Any) -> gs.Tensor | None:
    """x [tokens, hidden] where `tensor` [tokens · k, hidden] is every row of it k times over."""
    flat = producer(tensor, "Reshape")
    wide = producer(flat.inputs[0], "Expand") if flat is not None else None
    axis = producer(wide.inputs[0], "Unsqueeze") if wide is not None else None
    if wide is None or axis is None or len(axis.inputs[0].shape or ()) != 2:
        return None
    tokens, hidden = axis.inputs[0].shape
    fits = list(wide.outputs[0].shape or ()) == [tokens, k, hidden] and list(tensor.shape or ())[1:] == [hidden]
    return axis.inputs[0] if fits and ints(operand(axis, 1)) in ([1], [-2]) else None


def _gate(inner: gs.Tensor) -> Gate | str:
    """What `inner` is computed from row by row, up to a product with experts; or why it isn't."""
    nodes: dict[int, gs.Node] = {}
    ups: dict[int, tuple[gs.Tensor, Experts]] = {}
    numbers: list[float] = []
    pending = [inner]
    while pending:
        tensor = pending.pop()
        node = producer(tensor)
        if isinstance(tensor, gs.Constant):
            number = scalar(tensor)
            numbers.extend([] if number is None else [number])
        elif (up := experts_product(tensor)) is not None:
            ups[id(tensor)] = (tensor, up)
        elif node is None:
            if tensor.name:
                return f"the gate reads {tensor.name}"
        elif node.op not in _BETWEEN:
            return f"{node.name} ({node.op}) is no part of a gate"
        elif id(node) not in nodes:
            nodes[id(node)] = node
            pending.extend(node.inputs)
    if len(ups) != 1:
        return f"the gate reads {len(ups)} products with experts, expected one that makes gate and up together"
    ((source, up),) = ups.values()
    return Gate(up, source, list(nodes.values()), numbers)


def _recognise(inner: gs.Tensor, gate: Gate) -> dict[str, Any] | None:
    """The attributes with which `gated` computes what the gate does; found by trying, so however it was written."""
    width = (gate.source.shape or [None])[-1]
    if not isinstance(width, int) or width % 2:
        return None
    x = np.random.default_rng(0).uniform(-_SPREAD, _SPREAD, (_ROWS, width)).astype(np.float32)
    stand_in = gs.Variable(gate.source.name, np.dtype(np.float32), ["rows", width])
    try:
        (expected,) = excerpt(gate.nodes, [inner], [stand_in]).run({stand_in.name: x})
    except CannotEvaluate:
        return None
    if expected.shape != (_ROWS, width // 2):
        return None
    numbers = sorted({n for n in gate.numbers if 0 < abs(n) < 1e4})
    for interleaved, activation, limit in product((False, True), ACTIVATIONS, [0.0, *(n for n in numbers if n > 0)]):
        for alpha, beta in product([1.0, *numbers] if activation == "silu" else [1.0], [0.0, *numbers]):
            known = {"activation": activation, "alpha": alpha, "beta": beta, "limit": limit}
            found = gated(x, interleaved=interleaved, **known)  # type: ignore[arg-type]
            if np.allclose(found, expected, rtol=1e-4, atol=1e-4):
                return {**known, "interleaved": int(interleaved)}
    return None
