"""The batch axis of one that packing leaves behind sinks through the graph until it meets the Squeeze at its end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.analysis.operator_kinds import ELEMENTWISE, REDUCTIONS
from llmlab.graph.edit import Editor, constant_expression, ints, operand, producer, scope, value
from llmlab.graph.operators.functions import function_of
from llmlab.graph.passes.simplify import same_shape
from llmlab.graph.rewrite import Match, Pass

_AXIS = frozenset(("Softmax", "LogSoftmax", "RMSNormalization", "LayerNormalization", "Split", "Concat"))
_AXES = REDUCTIONS


class DropBatchAxis(Pass):
    """[1, T, …] → [T, …], operator by operator; what isn't known to allow it keeps its axis and still runs right."""

    name = "drop_batch_axis"

    def find(self, edit: Editor) -> Iterator[Match]:
        for node in list(edit.surgeon.nodes):  # in topological order: an axis sinks all the way in one go
            if node.outputs and any(_lifted(t) is not None for t in node.inputs):
                if node.op in ("Shape", "Unsqueeze"):
                    continue
                yield Match(node=node)
            elif node.outputs and _adds_batch(node):
                yield Match(node=node)

    def check(self, edit: Editor, match: Match) -> str | None:
        node = match.node
        if _adds_batch(node) or _removes_batch(node):
            return None
        match.attrs, match.swaps = dict(node.attrs), {}
        if node.op == "Squeeze":
            return None if ints(operand(node, 1)) == [0] else "it squeezes other axes than the batch"
        if len(node.outputs) > 1 and node.op != "Split":
            return f"{node.op} has several outputs"
        rank = len(node.outputs[0].shape or ())
        if rank < 2 or node.outputs[0].shape[0] != 1:
            return f"its output has shape {node.outputs[0].shape}, expected [1, …]"
        function = function_of(edit.surgeon, node)
        if function is not None and (foreign := _not_elementwise(function)) is not None:
            return f"{node.op} is a function, and {foreign} in it is not known to allow it"
        if function is not None or node.op in ELEMENTWISE:
            return self._elementwise(edit, match, rank)
        if node.op == "MatMul":
            lifted, weight = _lifted(node.inputs[0]), node.inputs[1]
            fits = lifted is not None and constant_expression(weight) and len(weight.shape or ()) == 2
            return None if fits else "it is not a product with a constant matrix"
        if node.op == "Gather":
            data, index = node.inputs
            fits = _lifted(index) is not None and _lifted(data) is None and node.attrs.get("axis", 0) == 0
            return None if fits else "it does not look tokens up in a table"
        if node.op == "Transpose":
            perm = list(node.attrs.get("perm", ()))
            if not perm or perm[0] != 0:
                return "it moves the batch axis"
            match.attrs["perm"] = [p - 1 for p in perm[1:]]
            return None
        if node.op == "Reshape":
            return self._reshape(match)
        return self._axes(match, rank)

    def _elementwise(self, edit: Editor, match: Match, rank: int) -> str | None:
        for i, tensor in enumerate(match.node.inputs):
            lifted, shape = _lifted(tensor), tensor.shape
            if lifted is not None:
                if len(tensor.shape or ()) != rank:
                    return f"input {i} has another rank than the output"
            elif operand(match.node, i) is None:
                continue
            elif shape is None or not (isinstance(tensor, gs.Constant) or len(shape) < rank):
                return f"input {i} is another tensor with a batch axis"
            elif len(shape) == rank:
                array = value(tensor)
                if shape[0] != 1 or array is None:
                    return f"input {i} is a constant of shape {list(shape)}"
                match.swaps[i] = np.squeeze(array, 0)
        return None

    def _reshape(self, match: Match) -> str | None:
        target = ints(match.node.inputs[1])
        if target is None or match.node.attrs.get("allowzero"):
            return "its sizes are computed"
        if not target or target[0] not in (0, 1):
            return f"it reshapes to {target}, which does not keep the batch axis"
        match.swaps[1] = np.asarray(target[1:], np.int64)
        return None

    def _axes(self, match: Match, rank: int) -> str | None:
        """Operators along an axis: any but the batch's."""
        node = match.node
        if node.op in _AXIS:
            axis = node.attrs.get("axis", 0 if node.op == "Split" else -1)
            if axis == 0 or axis == -rank:
                return "it works along the batch axis"
            if node.op == "Concat" and any(_lifted(t) is None for t in node.inputs):
                return "it joins tensors of which one has no batch axis to drop"
            match.attrs["axis"] = axis - 1 if axis > 0 else axis
            return None
        if node.op in _AXES or node.op == "Slice":
            at = 1 if node.op in _AXES else 3
            axes = ints(operand(node, at))
            if axes is None or any(a in (0, -rank) for a in axes):
                return "its axes are computed or include the batch's"
            if node.op in _AXES and not node.attrs.get("keepdims", 1):
                return "it does not keep the reduced axis"
            match.swaps[at] = np.asarray([a - 1 if a > 0 else a for a in axes], np.int64)
            return None
        return f"{node.op} is not known to allow it"

    def rewrite(self, edit: Editor, match: Match) -> None:
        node, where = match.node, scope(match.node)
        if node.op == "Squeeze" or _removes_batch(node):
            edit.replace(node.outputs[0], _lifted(node.inputs[0]))
            return
        if _adds_batch(node):
            axis = edit.constant("batch_axis", np.array([0], np.int64))
            old = node.outputs[0]
            edit.replace(old, edit.add("Unsqueeze", where, [node.inputs[0], axis], dtype=old.dtype, shape=old.shape))
            return
        inputs: list[gs.Tensor | None] = []
        for i, tensor in enumerate(node.inputs):
            lifted = _lifted(tensor)
            swapped = edit.constant(f"{node.name}/{i}", match.swaps[i]) if i in match.swaps else tensor
            inputs.append(lifted if lifted is not None else swapped)
        sizes = [(out.dtype, list(out.shape or ())[1:]) for out in node.outputs]
        flat = edit.add_many(node.op, where, inputs, match.attrs, sizes, domain=node.domain)
        axis = edit.constant("batch_axis", np.array([0], np.int64))
        for old, new in zip(list(node.outputs), flat, strict=True):
            lifted_out = edit.add("Unsqueeze", where, [new, axis], dtype=old.dtype, shape=old.shape)
            edit.replace(old, lifted_out)


def _not_elementwise(function: gs.Function) -> str | None:
    """The operator in a function's body that is not elementwise, if there is one; constants may have one axis."""
    for node in function.nodes:
        if node.op == "Constant":
            given = node.attrs.get("value")
            if isinstance(given, gs.Constant) and len(given.shape) > 1:
                return "a constant of several axes"
        elif node.domain or node.op not in ELEMENTWISE | {"CastLike"}:
            return str(node.op)
    return None


def _lifted(tensor: gs.Tensor) -> gs.Tensor | None:
    """x where `tensor` is Unsqueeze(x, axis 0), else None."""
    node = producer(tensor, "Unsqueeze")
    return node.inputs[0] if node is not None and ints(node.inputs[1]) == [0] else None


def _removes_batch(node: gs.Node) -> bool:
    """Whether a Reshape does what a Squeeze would: [1, T, …] → [T, …]."""
    flat = _lifted(node.inputs[0]) if node.op == "Reshape" else None
    return flat is not None and same_shape(flat.shape, node.outputs[0].shape)


def _adds_batch(node: gs.Node) -> bool:
    """Whether a Reshape does what an Unsqueeze would: [T, …] → [1, T, …]."""
    if (
        node.op != "Reshape"
        or node.inputs[0].shape is None
        or not any(isinstance(d, str) for d in node.inputs[0].shape)
    ):
        return False
    return same_shape([1, *node.inputs[0].shape], node.outputs[0].shape)
