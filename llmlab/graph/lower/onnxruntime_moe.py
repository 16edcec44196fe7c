"""Mixtures of experts for ONNX Runtime's CPU: its own MoE operator where that can express the node, else expert by expert.

`com.microsoft.MoE` takes router logits and does its own softmax and top-k, so the routing that the graph computed is handed to it
as logits: log(weight) for the chosen experts, nothing for the others. Its softmax gives back weight / sum, and the result is
multiplied by the sum. That holds for weights that can't be negative and experts that are distinct.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, operand, producer, scope, value
from llmlab.graph.lower.gated import activate
from llmlab.graph.quantized import quantized
from llmlab.graph.store.lazy import row
from llmlab.graph.store.storage import onnx_dtype

_FLOAT, _INT64 = np.dtype(np.float32), np.dtype(np.int64)
_NOTHING = -1e30  # a router logit that softmax makes zero
_LEAST = 1e-38  # a weight whose logarithm is still a number

_PASSES_ON = frozenset(
    ("Cast", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)
_KEEPS_SIGN = frozenset(("ReduceMax", "ReduceMean", "ReduceSum", "Sqrt", "Pow", "TopK"))
_BOTH = frozenset(("Add", "Div", "Mul", "Max", "Min"))


def lower_experts(edit: Editor) -> None:
    """Replace every MixtureOfExperts node, in place."""
    for node in [n for n in edit.surgeon.nodes if n.op == "MixtureOfExperts"]:
        fits = node.attrs["activation"] == "silu" and _distinct(node.inputs[1]) and not_negative(node.inputs[2])
        edit.replace(node.outputs[0], _one_operator(edit, node) if fits else _expert_by_expert(edit, node))


def not_negative(tensor: gs.Tensor) -> bool:
    """Whether the values can be shown to be zero or more, from the operators that made them."""
    if isinstance(tensor, gs.Constant):
        array = value(tensor)
        return array is not None and bool((array >= 0).all())
    node = producer(tensor)
    if node is None:
        return False
    if node.op in ("Softmax", "Sigmoid", "Exp", "Relu", "Abs", "Softplus"):
        return True
    if node.op in _PASSES_ON or node.op in _KEEPS_SIGN:
        return not_negative(node.inputs[0])
    return node.op in _BOTH and all(not_negative(t) for t in node.inputs)


def _distinct(index: gs.Tensor) -> bool:
    """Whether a row never names an expert twice: it is what TopK found."""
    node = producer(index)
    while node is not None and node.op in ("Cast", "Identity"):
        index, node = node.inputs[0], producer(node.inputs[0])
    return node is not None and node.op == "TopK" and index is node.outputs[1] and node.attrs.get("axis", -1) in (-1, 1)


def _one_operator(edit: Editor, node: gs.Node) -> gs.Variable:
    x, index, weight, gate_up, down = node.inputs[:5]
    where, attrs, out = scope(node), node.attrs, node.outputs[0]
    (experts, *_), tokens = gate_up.shape, out.shape[0]
    gate_up, down = (_rows_first(edit, where, t, attrs["transposed"]) for t in (gate_up, down))
    bias, down_bias = operand(node, 5), operand(node, 6)
    if not attrs["interleaved"]:
        gate_up = _interleaved(edit, where, gate_up)
        bias = None if bias is None else _interleaved(edit, where, bias)
    least = edit.constant(f"{where}/least", np.array(_LEAST, np.float32))
    sure = edit.add("Max", where, [weight, least], dtype=_FLOAT, shape=weight.shape)
    logs = edit.add("Log", where, [sure], dtype=_FLOAT, shape=weight.shape)
    count = edit.add("Shape", where, [index], {"start": 0, "end": 1}, dtype=_INT64, shape=[1])
    size = edit.add(
        "Concat",
        where,
        [count, edit.constant(f"{where}/experts", np.array([experts]))],
        {"axis": 0},
        dtype=_INT64,
        shape=[2],
    )
    empty = edit.constant(f"{where}/nothing", np.full((1, 1), _NOTHING, np.float32))
    nothing = edit.add("Expand", where, [empty, size], dtype=_FLOAT, shape=[tokens, experts])
    logits = edit.add(
        "ScatterElements", where, [nothing, index, logs], {"axis": 1}, dtype=_FLOAT, shape=[tokens, experts]
    )
    options: dict[str, Any] = {
        "k": index.shape[1],
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # interleaved: the only layout that the CPU has
        "activation_alpha": attrs["alpha"],
        "activation_beta": attrs["beta"],
    }
    if attrs["limit"]:
        options["swiglu_limit"] = attrs["limit"]
    mixed = edit.add(
        "MoE",
        where,
        [x, logits, gate_up, bias, down, down_bias],
        options,
        dtype=_FLOAT,
        shape=out.shape,
        domain="com.microsoft",
    )
    axis = edit.constant(f"{where}/axis", np.array([1]))
    total = edit.add("ReduceSum", where, [weight, axis], {"keepdims": 1}, dtype=_FLOAT, shape=[tokens, 1])
    return edit.add("Mul", where, [mixed, total], dtype=_FLOAT, shape=out.shape)


def _rows_first(edit: Editor, where: str, weight: gs.Tensor, transposed: int) -> gs.Tensor:
    """[E, out, in], as the operator wants it."""
    if not transposed:
        return weight
    experts, depth, width = weight.shape
    return edit.add(
        "Transpose", where, [weight], {"perm": [0, 2, 1]}, dtype=weight.dtype, shape=[experts, width, depth]
    )


def _interleaved(edit: Editor, where: str, weight: gs.Tensor) -> gs.Tensor:
    """[E, gate then up, …] → [E, gate and up in turns, …]."""
    experts, both, *rest = weight.shape
    split, turned = [experts, 2, both // 2, *rest], [experts, both // 2, 2, *rest]
    halves = edit.add(
        "Reshape", where, [weight, edit.constant(f"{where}/halves", np.array(split))], dtype=weight.dtype, shape=split
    )
    perm = [0, 2, 1, *range(3, len(split))]
    pairs = edit.add("Transpose", where, [halves], {"perm": perm}, dtype=weight.dtype, shape=turned)
    back = edit.constant(f"{where}/pairs", np.array(weight.shape))
    return edit.add("Reshape", where, [pairs, back], dtype=weight.dtype, shape=weight.shape)


def _expert_by_expert(edit: Editor, node: gs.Node) -> gs.Variable:
    """Ordinary operators: for each expert, the rows that chose it are picked out, computed and added back."""
    x, index, weight, gate_up, down = node.inputs[:5]
    where, attrs, out = scope(node), node.attrs, node.outputs[0]
    hidden, inner = out.shape[1], down.shape[1 if attrs["transposed"] else 2]
    zero = edit.constant(f"{where}/zero", np.array(0, np.float32))
    result = edit.add("Mul", where, [x, zero], dtype=_FLOAT, shape=out.shape)
    last = edit.constant(f"{where}/last", np.array([1]))
    for expert in range(gate_up.shape[0]):
        number = edit.constant(f"{where}/expert", np.array(expert))
        hit = edit.add("Equal", where, [index, number], dtype=np.dtype(bool), shape=index.shape)
        chosen = edit.add("NonZero", where, [hit], dtype=_INT64, shape=[2, None])
        pairs = edit.add("Transpose", where, [chosen], {"perm": [1, 0]}, dtype=_INT64, shape=[None, 2])
        first = edit.constant(f"{where}/first", np.array([0]))
        rows = edit.add("Gather", where, [pairs, first], {"axis": 1}, dtype=_INT64, shape=[None, 1])
        picked = edit.add("GatherND", where, [x, rows], dtype=_FLOAT, shape=[None, hidden])
        counts = edit.add("GatherND", where, [weight, pairs], dtype=_FLOAT, shape=[None])
        column = edit.add("Unsqueeze", where, [counts, last], dtype=_FLOAT, shape=[None, 1])
        both = _product(edit, where, picked, node, 3, 5, expert, 2 * inner)
        gated = _gate(edit, where, both, attrs, inner)
        made = _product(edit, where, gated, node, 4, 6, expert, hidden)
        counted = edit.add("Mul", where, [made, column], dtype=_FLOAT, shape=[None, hidden])
        result = edit.add(
            "ScatterND", where, [result, rows, counted], {"reduction": "add"}, dtype=_FLOAT, shape=out.shape
        )
    return result


def _product(
    edit: Editor, where: str, x: gs.Tensor, node: gs.Node, at: int, bias_at: int, expert: int, width: int
) -> gs.Variable:
    bias = operand(node, bias_at)
    inputs = [x, _of_expert(edit, node.inputs[at], expert), None if bias is None else _of_expert(edit, bias, expert)]
    options = {"transB": 1 - node.attrs["transposed"]}
    return edit.add("Gemm", where, inputs, options, dtype=_FLOAT, shape=[None, width])


def _of_expert(edit: Editor, stacked: gs.Tensor, expert: int) -> gs.Tensor:
    """One expert's part of a stacked weight, of which the rest is not read."""
    if (whole := quantized(stacked)) is not None:
        return whole.row(expert).add(edit, stacked.name)
    cast = producer(stacked, "Cast")
    source = stacked if cast is None else cast.inputs[0]
    shape = list(stacked.shape)[1:]
    if not isinstance(source, gs.Constant):
        number = edit.constant(f"{stacked.name}.number", np.array(expert))
        return edit.add("Gather", stacked.name, [stacked, number], {"axis": 0}, dtype=stacked.dtype, shape=shape)
    part = gs.Constant(edit.name(f"{source.name}.{expert}"), row(source._values, expert))
    if cast is None:
        return part
    return edit.add("Cast", source.name, [part], {"to": onnx_dtype(_FLOAT)}, dtype=_FLOAT, shape=shape)


def _gate(edit: Editor, where: str, both: gs.Tensor, attrs: dict[str, Any], inner: int) -> gs.Tensor:
    """`kernels.experts.gated` in ordinary operators."""
    shape = [None, inner]

    def number(name: str, given: float) -> gs.Constant:
        return edit.constant(f"{where}/{name}", np.array(given, np.float32))

    def make(op: str, *inputs: gs.Tensor | None, **options: Any) -> gs.Variable:
        return edit.add(op, where, inputs, options, dtype=_FLOAT, shape=shape)

    ranges = ((0, 2 * inner, 2), (1, 2 * inner, 2)) if attrs["interleaved"] else ((0, inner, 1), (inner, 2 * inner, 1))
    gate, up = (
        make("Slice", both, *(edit.constant(f"{where}/slice", np.array([n])) for n in (begin, end, 1, step)))
        for begin, end, step in ranges
    )
    if attrs["limit"]:
        high, low = number("limit", attrs["limit"]), number("limit", -attrs["limit"])
        gate, up = make("Min", gate, high), make("Clip", up, low, high)
    active = activate(edit, where, attrs["activation"], attrs["alpha"], gate)
    return make("Mul", active, make("Add", up, number("beta", attrs["beta"])) if attrs["beta"] else up)
