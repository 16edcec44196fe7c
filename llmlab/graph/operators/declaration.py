"""What a declared operator is: its attributes and inputs, its ONNX body, and the rules for shapes and types of its outputs."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import FunctionProto, TypeProto, helper

from llmlab.errors import InputError
from llmlab.graph.edit import Dim
from llmlab.graph.graph import OPSET
from llmlab.graph.operators.body import ATTRIBUTE_TYPES, IMPLEMENTATION, Attribute, AttributeValue, write_body
from llmlab.graph.operators.shapes import evaluate_rule

Shape = Sequence[Dim]
_RESERVED = frozenset(("ai", "aten", "com", "llmlab", "onnx", "onnx_symbolic", "prim", "prims", "quantized", "torch"))
_METHODS = ("shape", "reference", "onnx")
_declared: dict[tuple[str, str], Declaration] = {}


class Declaration:
    """An operator as its class declares it, read and checked. Raises InputError where the class is incomplete."""

    def __init__(self, name: str, declaration: type) -> None:
        self.name = name
        self.domain, self.op = self.key = _parse(name)
        self._declaration = declaration
        self.__doc__ = inspect.getdoc(declaration)
        for method in _METHODS:
            if not inspect.isfunction(getattr(declaration, method, None)):
                raise InputError(f"{name}: no method {method!r}; expected {', '.join(_METHODS)}")
        self.has_kernel = hasattr(declaration, "triton")
        self.inputs = self._input_names()
        self.attributes = self._attribute_types()
        refs = {n: Attribute(n, kind) for n, (kind, _) in self.attributes.items()}
        try:
            self.function: FunctionProto = write_body(
                self.domain, self.op, self.inputs, self.attributes, self._with(refs).onnx
            )
        except Exception as problem:  # the method is the user's
            raise InputError(f"{name}: its onnx() fails: {_line(problem)}") from problem
        self.num_outputs = len(self.function.output)

    def attribute_values(self, given: dict[str, Any]) -> dict[str, AttributeValue]:
        """Every attribute's value in a call that gives some. Raises InputError for unknown, missing or mistyped ones."""
        if unknown := sorted(set(given) - set(self.attributes)):
            raise InputError(
                f"{self.name} has no attribute {unknown[0]!r}; it has {', '.join(self.attributes) or 'none'}"
            )
        values = {}
        for name, (kind, default) in self.attributes.items():
            value = given.get(name, default)
            if value is None:
                raise InputError(f"{self.name} wants the attribute {name!r}: it has no default")
            values[name] = _typed(f"{self.name}: {name}", kind, value)
        return values

    def check_count(self, inputs: Sequence[Any]) -> None:
        """Raises InputError where the operator takes more or fewer inputs."""
        if len(inputs) != len(self.inputs):
            raise InputError(
                f"{self.name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}"
            )

    def reference(self, *inputs: Any, **attributes: Any) -> Any:
        """What the NumPy reference makes of arrays."""
        given = self.attribute_values(attributes)
        self.check_count(inputs)
        return self._with(given).reference(*(np.asarray(i) for i in inputs))

    def shapes(self, *shapes: Shape, **attributes: Any) -> list[list[Dim]]:
        """Shapes of the outputs by the shape rule. Sizes may be symbols; one that depends on them is None."""
        rule = self._with(self.attribute_values(attributes)).shape
        return evaluate_rule(self.name, lambda *s: self.as_list(rule(*s)), shapes)

    def as_list(self, results: Any) -> list[Any]:
        """What a method returns, an entry per output."""
        return [results] if self.num_outputs == 1 else list(results)

    def dtypes(self, *dtypes: np.dtype, **attributes: Any) -> list[np.dtype]:
        """Types of the outputs for inputs of these types, inferred from the body."""
        types = [TypeProto(tensor_type=TypeProto.Tensor(elem_type=helper.np_dtype_to_tensor_dtype(d))) for d in dtypes]
        given = [helper.make_attribute(k, v) for k, v in self.attribute_values(attributes).items() if v != ()]
        try:
            results = onnx.shape_inference.infer_function_output_types(self.function, types, given)
            return [np.dtype(helper.tensor_dtype_to_np_dtype(t.tensor_type.elem_type)) for t in results]
        except Exception as problem:  # onnx raises its own
            names = ", ".join(str(d) for d in dtypes)
            raise InputError(
                f"{self.name}: its body does not take inputs of type {names}: {_line(problem)}"
            ) from problem

    def with_attributes(self, **attributes: Any) -> Any:
        """An instance of the declaration whose attributes have these values: what its methods see as `self`."""
        return self._with(self.attribute_values(attributes))

    def __repr__(self) -> str:
        known = [
            f"{n}: {getattr(k, '__name__', k)}" + ("" if d is None else f" = {d!r}")
            for n, (k, d) in self.attributes.items()
        ]
        arguments = ", ".join([*self.inputs, *(["*", *known] if known else [])])
        kernel = "a Triton kernel" if self.has_kernel else "no Triton kernel"
        return f"{self.name}({arguments}): {len(self.function.node)} nodes in ONNX, {kernel}"

    def _with(self, values: dict[str, Any]) -> Any:
        instance: Any = object.__new__(self._declaration)
        instance.__dict__.update(values)
        return instance

    def _input_names(self) -> tuple[str, ...]:
        found = {}
        for method, skipped in (("reference", 1), ("shape", 1), ("onnx", 2)):
            parameters = list(inspect.signature(getattr(self._declaration, method)).parameters.values())[skipped:]
            if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
                raise InputError(f"{self.name}: the inputs of {method}() must be plain parameters without defaults")
            found[method] = tuple(p.name for p in parameters)
        names = found["reference"]
        if not names:
            raise InputError(f"{self.name}: reference() takes no input; expected at least one beside self")
        for method, other in found.items():
            if len(other) != len(names):
                raise InputError(f"{self.name}: reference() takes {len(names)} inputs, {method}() takes {len(other)}")
        return names

    def _attribute_types(self) -> dict[str, tuple[Any, AttributeValue | None]]:
        try:
            hints = typing.get_type_hints(self._declaration)
        except Exception as problem:  # an annotation that names nothing
            raise InputError(f"{self.name}: an annotation can't be read: {_line(problem)}") from problem
        result = {}
        for name, kind in hints.items():
            if kind not in ATTRIBUTE_TYPES:
                known = ", ".join(
                    getattr(k, "__name__", str(k)) if k in (float, int, str) else str(k) for k in ATTRIBUTE_TYPES
                )
                raise InputError(f"{self.name}: {name} is annotated {kind!r}; expected one of {known}")
            if name == IMPLEMENTATION or name in self.inputs or name.startswith("_"):
                raise InputError(f"{self.name}: an attribute can't be called {name!r}: choose another name")
            default = getattr(self._declaration, name, None)
            result[name] = (kind, None if default is None else _typed(f"{self.name}: {name}", kind, default))
        return result


def declare(made: Declaration, *, replace: bool) -> None:
    """Let `find` find it. Raises InputError where its name is taken and it may not replace the other."""
    if made.key in _declared and not replace:
        raise InputError(f"{made.name} is declared already: choose another name, or pass replace=True")
    _declared[made.key] = made


def find(domain: str | None, op: str) -> Declaration | None:
    """The operator declared in this process that a node of this domain and type is, if there is one."""
    return _declared.get((domain or "", op))


def _parse(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"([a-z]\w*)::([A-Za-z]\w*)", name, re.ASCII) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"the operator's name is {name!r}; expected 'domain::name', such as 'mylab::clipped_silu'")
    domain, op = match.groups()
    if domain in _RESERVED:
        raise InputError(f"{name}: the domain {domain!r} is reserved: choose one of your own")
    if onnx.defs.has(op, max_inclusive_version=OPSET, domain=""):
        raise InputError(f"{name}: ONNX has an operator {op!r}, which passes would take it for: choose another name")
    return domain, op


def _typed(where: str, kind: Any, value: Any) -> AttributeValue:
    """`value` as an attribute of type `kind`; whole numbers and lists are taken for what they stand for."""
    if kind in (tuple[int, ...], tuple[float, ...]) and isinstance(value, (list, tuple)):
        item = typing.get_args(kind)[0]
        return tuple(typing.cast(Any, _typed(where, item, v)) for v in value)
    fits = isinstance(value, (kind, int) if kind is float else kind) if kind in (float, int, str) else False
    if not fits or isinstance(value, bool):
        raise InputError(
            f"{where} is {value!r}, expected {getattr(kind, '__name__', kind) if kind in (float, int, str) else kind}"
        )
    return float(value) if kind is float else value


def _line(problem: BaseException) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if isinstance(problem, InputError) else f"{type(problem).__name__}: {text}"
