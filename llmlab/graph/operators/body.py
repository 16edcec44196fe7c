"""An operator's ONNX function body, written in Python: `op.Mul(x, op.Sigmoid(x))` adds nodes and gives values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, helper, numpy_helper

from llmlab.errors import InputError, nearest
from llmlab.graph.edit import RANDOM
from llmlab.graph.graph import OPSET

AttributeValue = float | int | str | tuple[int, ...] | tuple[float, ...]
IMPLEMENTATION = "implementation"
"""An attribute that every function has: which implementation of the operator a target used."""
_KINDS: dict[Any, tuple[int, str]] = {  # type of an attribute → its ONNX type, the attribute of Constant that holds it
    float: (AttributeProto.FLOAT, "value_float"),
    int: (AttributeProto.INT, "value_int"),
    str: (AttributeProto.STRING, "value_string"),
    tuple[int, ...]: (AttributeProto.INTS, "value_ints"),
    tuple[float, ...]: (AttributeProto.FLOATS, "value_floats"),
}
ATTRIBUTE_TYPES = tuple(_KINDS)


def onnx_type(kind: Any) -> int:
    """The ONNX type of an attribute that is annotated `kind`."""
    return _KINDS[kind][0]


@dataclass(frozen=True)
class Value:
    """A tensor inside a body."""

    name: str


@dataclass(frozen=True)
class Attribute:
    """An attribute while the body is written: each node brings its own value, so there is none to compute with."""

    name: str
    kind: Any

    def _no_value(self) -> Any:
        raise InputError(f"{self.name} has no value while the body is written: hand it to an operator as it is")

    __bool__ = __float__ = __int__ = __index__ = __len__ = __iter__ = _no_value


class BodyBuilder:
    """Nodes of a function body. `op.Name(*operands, outputs=1, **attributes)` adds the ONNX operator `Name` (opset 23).

    An operand is a value, an attribute of the operator, a number, a list or an array; None omits it. Constants that must
    have the type of another operand take it (`CastLike`), so that a body serves float32 and float16 alike.
    Returns a Value, or a tuple of them where `outputs` is more than one.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._count = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            schema = onnx.defs.get_schema(name, OPSET, "")
        except Exception:
            known = [s.name for s in onnx.defs.get_all_schemas() if s.domain == ""]
            raise InputError(f"ONNX has no operator {name!r} ({nearest(name, known)})") from None

        if name in RANDOM:
            raise InputError(f"{name} gives something else each time; an operator depends on its inputs alone")

        def emit(*operands: Any, outputs: int = 1, **attributes: Any) -> Any:
            return self._emit(schema, operands, outputs, attributes)

        return emit

    def _emit(self, schema: Any, operands: Sequence[Any], outputs: int, attributes: dict[str, Any]) -> Any:
        types = [formal.type_str for formal in schema.inputs]
        if types and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
            types += types[-1:] * (len(operands) - len(types))
        if len(operands) > len(types):
            raise InputError(f"{schema.name} takes at most {len(types)} operands, got {len(operands)}")
        like = {t: o for t, o in reversed(list(zip(types, operands, strict=False))) if isinstance(o, Value)}
        names = [self._operand(o, like.get(t)) for t, o in zip(types, operands, strict=False)]
        node = helper.make_node(schema.name, names, [self._name() for _ in range(outputs)])
        for key, given in attributes.items():
            if key not in schema.attributes:
                raise InputError(f"{schema.name} has no attribute {key!r} ({nearest(key, schema.attributes)})")
            node.attribute.append(_attribute(schema, key, given))
        self.nodes.append(node)
        values = tuple(Value(name) for name in node.output)
        return values if outputs > 1 else values[0]

    def _operand(self, given: Any, like: Value | None) -> str:
        if given is None:
            return ""
        if isinstance(given, Value):
            return given.name
        if isinstance(given, Attribute):
            kind, key = _KINDS[given.kind]
            attribute = AttributeProto(name=key, type=kind, ref_attr_name=given.name)
        else:
            array = np.asarray(given)
            array = (
                array.astype(np.float32) if array.dtype == np.float64 and not isinstance(given, np.ndarray) else array
            )
            if array.dtype.kind not in "biuf":
                raise InputError(f"an operand is {given!r}; expected a value, an attribute, a number or an array")
            attribute = helper.make_attribute("value", numpy_helper.from_array(array))
        constant = onnx.NodeProto(op_type="Constant", output=[self._name()], attribute=[attribute])
        self.nodes.append(constant)
        if like is None:
            return constant.output[0]
        self.nodes.append(helper.make_node("CastLike", [constant.output[0], like.name], [self._name()]))
        return self.nodes[-1].output[0]

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"


def _attribute(schema: Any, key: str, given: Any) -> AttributeProto:
    kind = int(schema.attributes[key].type)
    if not isinstance(given, Attribute):
        try:
            return helper.make_attribute(key, given, attr_type=kind)
        except (TypeError, ValueError) as problem:
            raise InputError(f"{schema.name}'s attribute {key!r} can't be {given!r}") from problem
    if onnx_type(given.kind) != kind:
        raise InputError(f"{schema.name}'s attribute {key!r} is of another type than {given.name}")
    return AttributeProto(name=key, type=onnx_type(given.kind), ref_attr_name=given.name)


def write_body(
    domain: str,
    op: str,
    inputs: Sequence[str],
    attributes: dict[str, tuple[Any, AttributeValue | None]],
    write: Callable[..., Any],
) -> FunctionProto:
    """The function that `write(builder, *input values)` describes. `attributes`: type and default (None: required)."""
    builder = BodyBuilder()
    made = write(builder, *(Value(name) for name in inputs))
    results = made if isinstance(made, tuple) else (made,)
    if not results or not all(isinstance(r, Value) for r in results):
        raise InputError(f"its onnx() returns {made!r}; expected a value or a tuple of values")
    results = tuple(builder.Identity(r) for r in results)  # so that no output is an input, or another output
    defaults = [helper.make_attribute(IMPLEMENTATION, "onnx")]
    for name, (kind, default) in attributes.items():
        if default is not None:
            defaults.append(helper.make_attribute(name, default, attr_type=onnx_type(kind)))
    function = helper.make_function(
        domain,
        op,
        list(inputs),
        [r.name for r in results],
        builder.nodes,
        [helper.make_opsetid("", OPSET)],
        [name for name, (_, default) in attributes.items() if default is None],
        defaults,
    )
    # Passes may reorder a body that travels with a graph; this says which declaration it was.
    function.doc_string = hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()[:16]
    return function
