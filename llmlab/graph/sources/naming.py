"""A node's name says which module made it, as far as the exporter wrote that down: `model.layers.0.mlp/MatMul`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from onnx import NodeProto

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which torch keeps the modules around a node."""


def innermost(scopes: str) -> str:
    """The module in torch's list of scopes, of which the last is the operation itself."""
    names = scopes.strip("[]").split(", ")
    return names[-2].strip("'") if len(names) > 1 else ""


def module_of(node: NodeProto) -> str:
    """The path of the module that made `node`: from torch's metadata, or a name such as `/model/layers.0/mlp/MatMul`."""
    for entry in node.metadata_props:
        if entry.key == SCOPES and isinstance(entry.value, str) and entry.value.isprintable():
            return innermost(entry.value)
    return node.name.strip("/").rpartition("/")[0].replace("/", ".")


def name_nodes(nodes: Iterable[NodeProto]) -> None:
    """Name each node `module/Operator`, with a number behind all but the first of a kind."""
    count: Counter[str] = Counter()
    for node in nodes:
        name = f"{module_of(node)}/{node.op_type}"
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name] - 1}"
