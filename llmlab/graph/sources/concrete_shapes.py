"""The shapes of a graph from elsewhere, worked out here: what the file declares about the values inside it is not believed.

Every node's shape is inferred at several concrete batches and lengths, with the sizes that the graph computes for its
reshapes computed along; a dimension that is the batch, or the length, at each of them carries that symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TypeProto, helper, numpy_helper

from llmlab.errors import GraphError
from llmlab.files import DIM_LIMIT
from llmlab.graph.store.check import STANDARD

BATCH, SEQUENCE = "batch", "sequence"
_VALUES = 4096  # elements; larger values are no sizes
_FLOW = frozenset(("If", "Loop", "Scan", "SequenceMap"))

Dims = list[int | str | None]
Types = dict[str, TypeProto]


def infer(model: onnx.ModelProto, where: str, longest: int) -> dict[str, tuple[int, Dims | None]]:
    """(ONNX type, shape) of every value that a node of `model` makes, by name; a shape that can't be told is None.

    `model` has the inputs [batch, sequence] and sorted nodes of the standard operator set; `longest` is the longest
    sequence it is made for. Raises GraphError where types or shapes contradict each other.
    """
    sizes = [(b, min(s, longest)) for b, s in ((2, 5), (3, 11), (1, 1), (5, 257))]
    runs = [_Inference(model, where, b, s).run() for b, s in sizes]
    found: dict[str, tuple[int, Dims | None]] = {}
    for name, first in runs[0].items():
        types = [run.get(name) for run in runs]
        shapes = [_dims(t) if t is not None else None for t in types]
        fitted: Dims | None = None
        if all(s is not None for s in shapes) and len({len(s) for s in shapes if s is not None}) == 1:
            fitted = [_fit(seen, sizes) for seen in zip(*shapes, strict=True)]
        found[name] = (first.tensor_type.elem_type, fitted)
    return found


def _fit(seen: Sequence[int | None], sizes: Sequence[tuple[int, int]]) -> int | str | None:
    """One dimension at each of `sizes`: a number, a symbol, or nothing that has a name."""
    if None in seen:
        return None
    if len(set(seen)) == 1:
        return seen[0]
    if list(seen) == [b for b, _ in sizes]:
        return BATCH
    if list(seen) == [s for _, s in sizes]:
        return SEQUENCE
    return f"{BATCH}*{SEQUENCE}" if list(seen) == [b * s for b, s in sizes] else None


def _dims(value: TypeProto) -> list[int | None] | None:
    if not value.tensor_type.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in value.tensor_type.shape.dim]


class _Inference:
    """One walk over the nodes at one batch and length."""

    def __init__(self, model: onnx.ModelProto, where: str, batch: int, sequence: int) -> None:
        self.model, self.where = model, where
        self.opsets = [o for o in model.opset_import if o.domain in STANDARD]
        self.types: Types = {}
        self.values: dict[str, np.ndarray] = {}
        for tensor in model.graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                self.values[tensor.name] = numpy_helper.to_array(tensor)
        for value in model.graph.input:
            self.types[value.name] = helper.make_tensor_type_proto(value.type.tensor_type.elem_type, [batch, sequence])

    def run(self) -> Types:
        made: Types = {}
        for node in self.model.graph.node:
            types = self._node(node)
            self.types.update(types)
            made.update(types)
        return made

    def _node(self, node: NodeProto) -> Types:
        label = f"{self.where}: {node.name} ({node.op_type})"
        version = self.opsets[0].version
        _check_types(node, self.types, version, label)
        if (values := self._evaluate(node)) is not None:
            self.values[node.output[0]] = values
            return {
                node.output[0]: helper.make_tensor_type_proto(
                    helper.np_dtype_to_tensor_dtype(values.dtype), list(values.shape)
                )
            }
        if node.op_type in _FLOW or any(n and n not in self.types for n in node.input):
            return {}
        inputs = {n: self.types[n] for n in node.input if n}
        data = {n: numpy_helper.from_array(self.values[n], n) for n in node.input if n in self.values}
        try:
            schema = onnx.defs.get_schema(node.op_type, version)
            found = onnx.shape_inference.infer_node_outputs(schema, node, inputs, data, opset_imports=self.opsets)
        except Exception as problem:  # the inference raises types of its own
            reason = " ".join(str(problem).split()).removeprefix("[ShapeInferenceError] ")
            raise GraphError(f"{label}: its shapes or types don't fit: {reason}") from problem
        for name, kind in found.items():
            if any(d is not None and not 0 <= d <= DIM_LIMIT for d in _dims(kind) or ()):
                raise GraphError(f"{label}: {name!r} would have the shape {_dims(kind)}")
        return {n: t for n, t in found.items() if n and t.HasField("tensor_type")}

    def _evaluate(self, node: NodeProto) -> np.ndarray | None:
        """The node's value where it is small and depends on shapes and constants alone, as computed sizes do."""
        compute = _SIZES.get(node.op_type)
        if compute is None or len(node.output) != 1:
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
        inputs: list[Any]
        if node.op_type in ("Shape", "Size"):
            dims = _dims(self.types[node.input[0]]) if node.input[0] in self.types else None
            if dims is None or None in dims:
                return None
            inputs = [np.array(dims, np.int64)]
        else:
            if any(n and n not in self.values for n in node.input):
                return None
            inputs = [self.values[n] if n else None for n in node.input]
            if any(i is not None and i.size > _VALUES for i in inputs):
                return None
        try:
            with np.errstate(all="ignore"):
                result = np.asarray(compute(attributes, *inputs))
        except (ValueError, IndexError, TypeError, KeyError, ArithmeticError, MemoryError):
            return None  # the inference below says what is wrong with it
        return result if result.size <= _VALUES and result.dtype.kind in "iufb" else None


@cache
def _constraints(op: str, version: int) -> tuple[list[tuple[str, frozenset[str], bool]], bool]:
    """By formal input: its type variable, what that may be, and whether all of a variadic input have one type."""
    schema = onnx.defs.get_schema(op, version)
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    formal = [(p.type_str, allowed.get(p.type_str, frozenset((p.type_str,))), p.is_homogeneous) for p in schema.inputs]
    variadic = bool(schema.inputs) and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    return formal, variadic


def _check_types(node: NodeProto, types: Types, version: int, label: str) -> None:
    """The types of a node's inputs against what its operator allows, and against each other."""
    formal, variadic = _constraints(node.op_type, version)
    bound: dict[str, str] = {}
    for i, name in enumerate(node.input):
        if name not in types:
            continue
        variable, allowed, alike = formal[min(i, len(formal) - 1)] if variadic else formal[i]
        given = f"tensor({_type_name(types[name].tensor_type.elem_type)})"
        if given not in allowed:
            raise GraphError(f"{label}: input {i} is a {given}, which the operator doesn't take")
        if alike and bound.setdefault(variable, given) != given:
            raise GraphError(f"{label}: input {i} is a {given}, another a {bound[variable]}: expected one type")


@cache
def _type_name(elem_type: int) -> str:
    name = onnx.TensorProto.DataType.Name(elem_type).lower()
    return name if name != "undefined" else "?"


def _bounded(count: int) -> int:
    if not 0 <= count <= _VALUES:
        raise ValueError("no size")
    return count


def _broadcast(compute: Callable[..., Any]) -> Callable[..., Any]:
    def elementwise(attributes: dict[str, Any], *inputs: np.ndarray) -> Any:
        _bounded(int(np.prod(np.broadcast_shapes(*(i.shape for i in inputs)), dtype=object)))
        return compute(*inputs)

    return elementwise


def _expand(a: dict[str, Any], x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    wide = np.broadcast_shapes(x.shape, tuple(int(n) for n in shape))
    _bounded(int(np.prod(wide, dtype=object)))
    return np.broadcast_to(x, wide)


def _range(a: dict[str, Any], start: np.ndarray, limit: np.ndarray, step: np.ndarray) -> np.ndarray:
    _bounded(int(np.ceil((limit.item() - start.item()) / step.item())))
    return np.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _constant_of_shape(a: dict[str, Any], shape: np.ndarray) -> np.ndarray:
    fill = numpy_helper.to_array(a["value"]) if "value" in a else np.zeros(1, np.float32)
    _bounded(int(np.prod(shape, dtype=object)))
    return np.full(tuple(int(n) for n in shape), fill.reshape(-1)[0])


def _slice(a: dict[str, Any], x: np.ndarray, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> np.ndarray:
    at = range(len(starts)) if axes is None else axes
    by = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(at, starts, ends, by, strict=True):
        # Going down, an end before the start of the axis means all of it.
        stop = None if step < 0 and end < -x.shape[axis] else int(end)
        index[int(axis)] = slice(int(start), stop, int(step))
    return x[tuple(index)]


def _reshape(a: dict[str, Any], x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    keep = not a.get("allowzero")
    return x.reshape([x.shape[i] if n == 0 and keep else int(n) for i, n in enumerate(shape)])


def _gather(a: dict[str, Any], x: np.ndarray, index: np.ndarray) -> np.ndarray:
    axis = a.get("axis", 0)
    _bounded(index.size * (x.size // max(1, x.shape[axis])))
    return np.take(x, index, axis)


def _constant(a: dict[str, Any]) -> np.ndarray:
    ((key, given),) = a.items()
    if key == "value":
        _bounded(int(np.prod(given.dims, dtype=object)))
        return numpy_helper.to_array(given)
    return np.array(given, np.int64 if key.startswith("value_int") else np.float32)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integers are divided towards zero."""
    return x / y if x.dtype.kind == "f" else np.trunc(np.true_divide(x, y)).astype(x.dtype)


def _dtype(to: int) -> np.dtype:
    return np.dtype(helper.tensor_dtype_to_np_dtype(to))


def _axes(given: np.ndarray | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(int(i) for i in given)


_SIZES: dict[str, Callable[..., Any]] = {
    "Constant": _constant,
    "Shape": lambda a, dims: dims[a.get("start", 0) : a.get("end", len(dims))],
    "Size": lambda a, dims: np.prod(dims, dtype=np.int64),
    "Identity": lambda a, x: x,
    "Cast": lambda a, x: x.astype(_dtype(a["to"])),
    "CastLike": lambda a, x, like: x.astype(like.dtype),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda a, *x: np.concatenate(x, a["axis"]),
    "Squeeze": lambda a, x, axes=None: np.squeeze(x, _axes(axes)),
    "Unsqueeze": lambda a, x, axes: np.expand_dims(x, _axes(axes) or ()),
    "Reshape": _reshape,
    "Range": _range,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": lambda a, x, axes=None: np.prod(x, _axes(axes), dtype=x.dtype, keepdims=bool(a.get("keepdims", 1))),
    "Where": _broadcast(np.where),
    "Add": _broadcast(np.add),
    "Sub": _broadcast(np.subtract),
    "Mul": _broadcast(np.multiply),
    "Div": _broadcast(_divide),
    "Max": _broadcast(lambda *x: np.max(np.broadcast_arrays(*x), 0)),
    "Min": _broadcast(lambda *x: np.min(np.broadcast_arrays(*x), 0)),
    "Neg": _broadcast(np.negative),
    "Equal": _broadcast(np.equal),
    "Less": _broadcast(np.less),
    "LessOrEqual": _broadcast(np.less_equal),
    "Greater": _broadcast(np.greater),
    "GreaterOrEqual": _broadcast(np.greater_equal),
    "And": _broadcast(np.logical_and),
    "Or": _broadcast(np.logical_or),
    "Not": _broadcast(np.logical_not),
}
"""What sizes are computed with. Each is bounded before it is computed."""
