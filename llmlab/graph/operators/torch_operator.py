"""Declared operators in torch: callable on tensors, and kept as one node when a model that calls them is exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from llmlab.errors import require
from llmlab.graph.graph import OPSET
from llmlab.graph.operators.body import AttributeValue, onnx_type
from llmlab.graph.operators.declaration import Declaration, find

if TYPE_CHECKING:
    import torch

_SCHEMA = {float: "float", int: "int", str: "str", tuple[int, ...]: "int[]", tuple[float, ...]: "float[]"}
_registered: dict[tuple[str, str], tuple[Declaration, Any]] = {}


def register(op: Declaration) -> Callable[..., Any]:
    """Register `op` with torch and return it, callable on tensors. It computes with the NumPy reference, on the CPU."""
    require("torch", "export")
    import torch

    def compute(*tensors: torch.Tensor, **attributes: AttributeValue) -> Any:
        wide = [t.detach().cpu() for t in tensors]
        arrays = [(t.float() if t.dtype == torch.bfloat16 else t).numpy() for t in wide]
        results = op.as_list(op.with_attributes(**attributes).reference(*arrays))
        dtypes = _dtypes(op, tensors, attributes)
        made = [
            torch.from_numpy(np.array(r)).to(device=tensors[0].device, dtype=dtype)
            for r, dtype in zip(results, dtypes, strict=True)
        ]
        return made[0] if op.num_outputs == 1 else tuple(made)

    def fake(*tensors: torch.Tensor, **attributes: AttributeValue) -> Any:
        shapes = op.as_list(op.with_attributes(**attributes).shape(*(tuple(t.shape) for t in tensors)))
        dtypes = _dtypes(op, tensors, attributes)
        made = [tensors[0].new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
        return made[0] if op.num_outputs == 1 else tuple(made)

    made = torch.library.custom_op(op.name, compute, mutates_args=(), schema=_schema(op))
    made.register_fake(fake)
    target = getattr(getattr(torch.ops, op.domain), op.op).default
    _registered[op.key] = (op, target)
    return made


def translations() -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` is to make of the operators that torch code has called: a node each."""
    return {target: _translation(op) for op, target in _registered.values()}


def add_functions(model: onnx.ModelProto) -> None:
    """Give the model the bodies of the declared operators that it calls."""
    there = {(f.domain, f.name) for f in model.functions}
    for node in model.graph.node:
        op = find(node.domain, node.op_type)
        if op is not None and op.key not in there:
            there.add(op.key)
            model.functions.append(op.function)


def _schema(op: Declaration) -> str:
    tensors = [f"Tensor {name}" for name in op.inputs]
    attributes = []
    for name, (kind, default) in op.attributes.items():
        shown = list(default) if isinstance(default, tuple) else default
        attributes.append(f"{_SCHEMA[kind]} {name}" + ("" if default is None else f"={shown!r}"))
    arguments = ", ".join([*tensors, *(["*", *attributes] if attributes else [])])
    returns = ", ".join(["Tensor"] * op.num_outputs)
    return f"({arguments}) -> " + (returns if op.num_outputs == 1 else f"({returns})")


def _dtypes(op: Declaration, tensors: tuple[torch.Tensor, ...], attributes: dict[str, Any]) -> list[torch.dtype]:
    import ml_dtypes  # noqa: F401 (np.dtype knows bfloat16 from here)
    import torch

    given = [np.dtype(str(t.dtype).removeprefix("torch.")) for t in tensors]
    return [getattr(torch, dtype.name) for dtype in op.dtypes(*given, **attributes)]


def _translation(op: Declaration) -> Callable[..., Any]:
    from onnxscript.values import Op, Opset

    schema = onnx.defs.OpSchema
    every = list(onnx.defs.get_schema("Cast", OPSET).type_constraints[0].allowed_type_strs)
    node = Op(
        Opset(op.domain, 1),
        op.op,
        schema(
            op.op,
            op.domain,
            1,
            inputs=[schema.FormalParameter(n, f"T{i}") for i, n in enumerate(op.inputs)],
            outputs=[schema.FormalParameter(n, "T0") for n in op.function.output],
            type_constraints=[(f"T{i}", every, "") for i in range(len(op.inputs))],
            attributes=[
                schema.Attribute(n, schema.AttrType(onnx_type(k)), "", required=False)
                for n, (k, _) in op.attributes.items()
            ],
        ),
    )

    def translate(*inputs: Any, **attributes: Any) -> Any:
        return node(*inputs, **op.attribute_values(attributes))

    return translate
