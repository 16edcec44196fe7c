"""The nodes of a part of a graph, as a list that shows itself as a table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import onnx_graphsurgeon as gs

_LEFT = "style='text-align:left'"


class NodeTable(list[gs.Node]):
    """Nodes in execution order, with the tensors that they read and write."""

    def __str__(self) -> str:
        return "\n".join(f"{node.op:<18} {node.name}" for node in self) or "no nodes"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        names = [(n.name, n.op, [t.name for t in n.inputs], [t.name for t in n.outputs]) for n in self]
        return {"nodes": [dict(zip(("name", "op", "inputs", "outputs"), facts, strict=True)) for facts in names]}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        head = "".join(f"<th {_LEFT}>{name}</th>" for name in ("operator", "node", "reads", "writes"))
        rows = "".join(
            f"<tr><td {_LEFT}><b>{html.escape(node.op)}</b></td><td {_LEFT}>{html.escape(node.name)}</td>"
            f"<td {_LEFT}>{_tensors(node.inputs)}</td><td {_LEFT}>{_tensors(node.outputs)}</td></tr>"
            for node in self
        )
        return {"text/plain": str(self), "text/html": f"<table><tr>{head}</tr>{rows}</table>"}


def _tensors(tensors: Iterable[gs.Tensor]) -> str:
    """One line a tensor. Weights by their checkpoint name, values between nodes by their shape only."""
    lines = []
    for tensor in tensors:
        if tensor.is_empty():
            continue
        shape = "" if tensor.shape is None else "[" + ", ".join(map(str, tensor.shape)) + "]"
        named = isinstance(tensor, gs.Constant) or not tensor.inputs
        lines.append(f"<small>{html.escape(f'{tensor.name} {shape}'.strip() if named else shape or '?')}</small>")
    return "<br>".join(lines)
