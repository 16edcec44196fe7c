"""Operators that came into ONNX after the opset that a target reads, in terms of those that it has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.edit import Editor, ints, operand, scope, sort_nodes
from llmlab.graph.store.storage import onnx_dtype

_WIDE = np.dtype(np.float32)
NORMS = frozenset(("LayerNormalization", "RMSNormalization"))


def legalise(edit: Editor, opset: int, keep_fp32: set[str]) -> None:
    """Rewrite the graph, in place, for a reader of ONNX `opset` (17 to 23).

    keep_fp32: names of nodes that have to compute in float32. The nodes that one of them, or a norm, becomes are added.
    Raises UnsupportedModelError that names the first node that can't be written.
    """
    for node in [n for n in edit.surgeon.nodes if not n.domain]:
        since, expand = _EXPANSIONS.get(node.op, (0, None))
        if expand is not None and opset < since:
            count = len(edit.surgeon.nodes)
            edit.replace(node.outputs[0], expand(_Chain(edit, node), node))
            if node.op in NORMS or node.name in keep_fp32:
                keep_fp32.update(n.name for n in edit.surgeon.nodes[count:])
    sort_nodes(edit.surgeon.cleanup())
    for node in [n for n in edit.surgeon.nodes if not n.domain]:
        if opset < 18 and node.op == "Split":
            _sizes_of_split(edit, node)
        if opset < 18 and node.op.startswith("Reduce") and node.op != "ReduceSum":
            _axes_to_attribute(node)
        _check(node, opset)
    edit.surgeon.opset = opset
    edit.surgeon.import_domains = [onnx.helper.make_opsetid("", opset)]  # the exporter adds those of other nodes


def _check(node: gs.Node, opset: int) -> None:
    """Raises UnsupportedModelError where `opset` has no such operator, attribute or input."""
    name = f"{node.op} of ONNX opset {opset}, which the target reads,"
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        raise UnsupportedModelError(f"{node.name}: {name} does not exist") from None
    if unknown := sorted(set(node.attrs) - set(schema.attributes)):
        raise UnsupportedModelError(f"{node.name}: {name} has no attribute {unknown[0]!r}")
    if len(node.inputs) > schema.max_input:
        raise UnsupportedModelError(f"{node.name}: {name} takes {schema.max_input} inputs and not {len(node.inputs)}")


def _sizes_of_split(edit: Editor, node: gs.Node) -> None:
    """`num_outputs` → the sizes themselves."""
    parts = node.attrs.pop("num_outputs", None)
    if parts is None or operand(node, 1) is not None:
        return
    sizes = [(t.shape or [None])[node.attrs.get("axis", 0)] for t in node.outputs]
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedModelError(f"{node.name}: splits an axis whose size isn't known before a step")
    node.inputs = [node.inputs[0], edit.constant(f"{scope(node)}/widths", np.array(sizes, np.int64))]


def _axes_to_attribute(node: gs.Node) -> None:
    node.attrs.pop("noop_with_empty_axes", None)
    if operand(node, 1) is not None:
        axes = ints(node.inputs[1])
        if axes is None:
            raise UnsupportedModelError(f"{node.name}: {node.op} over axes that are computed in the step")
        node.attrs["axes"] = axes
    node.inputs = node.inputs[:1]


class _Chain:
    """Nodes of one module in float32, around a node whose input and output may be narrower."""

    def __init__(self, edit: Editor, node: gs.Node) -> None:
        self._edit, self._where = edit, scope(node)
        self.x = self.widened(node.inputs[0])
        self._shape, self._dtype = node.outputs[0].shape, np.dtype(node.outputs[0].dtype)

    def add(self, op: str, *inputs: gs.Tensor | float, **attrs: Any) -> gs.Variable:
        given = [
            self._edit.constant(f"{self._where}/number", np.array(t, np.float32)) if isinstance(t, float) else t
            for t in inputs
        ]
        return self._edit.add(op, self._where, given, attrs, dtype=_WIDE, shape=self._shape)

    def mean(self, x: gs.Tensor, axis: int) -> gs.Variable:
        """The mean over `axis` and all behind it, which stay as axes of one."""
        rank = len(self._shape)
        axes = np.arange(axis - rank if axis >= 0 else axis, 0)
        inputs = [x, self._edit.constant(f"{self._where}/axes", axes.astype(np.int64))]
        shape = [*self._shape[: rank - len(axes)], *[1] * len(axes)]
        return self._edit.add("ReduceMean", self._where, inputs, {"keepdims": 1}, dtype=_WIDE, shape=shape)

    def widened(self, tensor: gs.Tensor) -> gs.Tensor:
        return self._cast(tensor, _WIDE)

    def narrowed(self, tensor: gs.Variable) -> gs.Tensor:
        return self._cast(tensor, self._dtype)

    def _cast(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
        if tensor.dtype == dtype:
            return tensor
        attrs = {"to": onnx_dtype(dtype)}
        return self._edit.add("Cast", self._where, [tensor], attrs, dtype=dtype, shape=tensor.shape)


def _rms_norm(chain: _Chain, node: gs.Node) -> gs.Tensor:
    return chain.narrowed(_normed(chain, node, chain.x))


def _layer_norm(chain: _Chain, node: gs.Node) -> gs.Tensor:
    centred = chain.add("Sub", chain.x, chain.mean(chain.x, node.attrs.get("axis", -1)))
    result = _normed(chain, node, centred)
    bias = operand(node, 2)
    return chain.narrowed(result if bias is None else chain.add("Add", result, chain.widened(bias)))


def _normed(chain: _Chain, node: gs.Node, x: gs.Tensor) -> gs.Variable:
    """x · scale / √(mean of squares + epsilon)."""
    power = chain.mean(chain.add("Mul", x, x), node.attrs.get("axis", -1))
    root = chain.add("Sqrt", chain.add("Add", power, float(node.attrs.get("epsilon", 1e-5))))
    root.shape = root.inputs[0].inputs[0].shape = power.shape
    return chain.add("Mul", chain.add("Div", x, root), chain.widened(node.inputs[1]))


def _gelu(chain: _Chain, node: gs.Node) -> gs.Tensor:
    x = chain.x
    if node.attrs.get("approximate", "none") == "tanh":
        cube = chain.add("Mul", chain.add("Mul", chain.add("Mul", x, x), x), 0.044715)
        share = chain.add("Tanh", chain.add("Mul", chain.add("Add", x, cube), math.sqrt(2 / math.pi)))
    else:
        share = chain.add("Erf", chain.add("Mul", x, math.sqrt(0.5)))
    return chain.narrowed(chain.add("Mul", chain.add("Mul", x, 0.5), chain.add("Add", share, 1.0)))


_EXPANSIONS = {
    "Gelu": (20, _gelu),
    "LayerNormalization": (23, _layer_norm),  # opset 17 has it; TensorRT 8.6 computes it in its own precision
    "RMSNormalization": (23, _rms_norm),
}
"""By operator: the first opset in which it stays, and what it becomes below."""
