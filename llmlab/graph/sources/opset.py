"""A graph of another operator set brought to the project's: what only allows more stays, the rest is rewritten or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from llmlab.errors import UnsupportedModelError
from llmlab.graph.store.check import STANDARD

OLDEST = 13

# Same inputs and attributes in both versions, another meaning.
_CHANGED_MEANING = frozenset(
    ("GroupNormalization", "DFT", "GridSample", "Resize", "AveragePool", "Scan", "Upsample", "BatchNormalization")
)
_REDUCE = frozenset(
    f"Reduce{what}" for what in ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare", "Sum")
)

Rule = Callable[[onnx.ModelProto, NodeProto], list[NodeProto]]


def check_age(model: onnx.ModelProto, where: str) -> None:
    """Raise UnsupportedModelError for an operator set from before `OLDEST`."""
    if 0 < (version := _version(model)) < OLDEST:
        raise UnsupportedModelError(
            f"{where}: opset {version}; opset {OLDEST} and later are read: export with 18 or 23"
        )


def _version(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in STANDARD), 0)


def convert_opset(model: onnx.ModelProto, where: str, target: int) -> None:
    """Rewrite the nodes of `model` (functions written out) from its operator set to `target`, in place.

    Operators whose schema is the same in both, apart from the types that it allows, mean the same. Raises
    UnsupportedModelError that names the first node that can't be converted.
    """
    version = next(o.version for o in model.opset_import if o.domain in STANDARD)
    if version == target:
        return
    if version < OLDEST:
        raise UnsupportedModelError(
            f"{where}: opset {version}; opset {OLDEST} and later are read: export with 18 or 23"
        )
    converted: list[NodeProto] = []
    for node in model.graph.node:
        rule = _rule(node.op_type, version, target) if node.domain in STANDARD else _keep
        if rule is None:
            raise UnsupportedModelError(
                f"{where}: {node.name} ({node.op_type}) of opset {version} can't be brought to opset {target}: export with opset {target}"
            )
        converted += rule(model, node)
    del model.graph.node[:]
    model.graph.node.extend(converted)
    for entry in model.opset_import:
        if entry.domain in STANDARD:
            entry.version = target


def _keep(model: onnx.ModelProto, node: NodeProto) -> list[NodeProto]:
    return [node]


@cache
def _rule(op: str, version: int, target: int) -> Rule | None:
    """How `op` comes from one version to the other; None where that isn't known."""
    old = onnx.defs.get_schema(op, version)
    try:
        new = onnx.defs.get_schema(op, target)
    except onnx.defs.SchemaError:
        return _swish if op == "Swish" else None
    if old.since_version == new.since_version:
        return _keep
    if op in _REDUCE and "axes" in old.attributes and "axes" not in new.attributes:
        return _axes_to_input
    if op == "Split" and "num_outputs" in new.attributes and "num_outputs" not in old.attributes:
        return _count_outputs
    if op in _CHANGED_MEANING or new.deprecated:
        return None
    names = ([p.name for p in schema.inputs] for schema in (old, new))
    before, after = names
    if version < target:
        fits = after[: len(before)] == before and set(old.attributes) <= set(new.attributes)
    else:
        fits = before[: len(after)] == after and set(new.attributes) <= set(old.attributes)
    return (_keep if version < target else _only_common(new)) if fits else None


def _only_common(new: onnx.defs.OpSchema) -> Rule:
    """A newer operator as an older one, where nothing that only the newer one has is used."""

    def rule(model: onnx.ModelProto, node: NodeProto) -> list[NodeProto]:
        extra = [a.name for a in node.attribute if a.name not in new.attributes]
        if extra or len(node.input) > new.max_input:
            what = f"attribute {extra[0]!r}" if extra else f"input {len(node.input)}"
            raise UnsupportedModelError(
                f"{node.name} ({node.op_type}): its {what} is of a newer opset: export with opset 23"
            )
        return [node]

    return rule


def _axes_to_input(model: onnx.ModelProto, node: NodeProto) -> list[NodeProto]:
    """Opset 18: the axes of reductions became an input."""
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    kept = [a for a in node.attribute if a.name != "axes"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if axes is not None:
        node.input.append(add_initializer(model, f"{node.output[0]}.axes", np.array(axes, np.int64)))
    return [node]


def _count_outputs(model: onnx.ModelProto, node: NodeProto) -> list[NodeProto]:
    """Opset 18: a Split into equal parts says how many."""
    if len(node.input) < 2 or not node.input[1]:
        node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    return [node]


def _swish(model: onnx.ModelProto, node: NodeProto) -> list[NodeProto]:
    """Opset 24 has x · sigmoid(αx) as an operator; its type is that of a float32 graph."""
    (x,), (y,) = node.input, node.output
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
    scaled, gate = f"{y}.scaled", f"{y}.gate"
    factor = add_initializer(model, f"{y}.alpha", np.array(alpha, np.float32))
    return [
        helper.make_node("Mul", [x, factor], [scaled], f"{node.name}/Mul"),
        helper.make_node("Sigmoid", [scaled], [gate], f"{node.name}/Sigmoid"),
        helper.make_node("Mul", [x, gate], [y], f"{node.name}/Mul_1"),
    ]


def add_initializer(model: onnx.ModelProto, name: str, values: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name
