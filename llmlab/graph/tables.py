"""Lists that show themselves as tables in a notebook: what the passes did, and the nodes of a part of a graph."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from llmlab.graph.rewrite import PassReport

_LEFT = "style='text-align:left'"


class History(list["PassReport"]):
    """The reports of the passes that made a graph, in order."""

    def __str__(self) -> str:
        return "\n".join(str(report) for report in self) or "no pass has run"

    __repr__ = __str__

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        rows = "".join(_report_row(report) for report in self)
        head = "".join(
            f"<th {_LEFT}>{name}</th>"
            for name in ("pass", "rewritten", "nodes", "operators that came and went", "time")
        )
        return {"text/plain": str(self), "text/html": f"<table><tr>{head}</tr>{rows}</table>"}


class NodeTable(list[gs.Node]):
    """Nodes in execution order, with the tensors that they read and write."""

    def __str__(self) -> str:
        return "\n".join(f"{node.op:<18} {node.name}" for node in self) or "no nodes"

    __repr__ = __str__

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        head = "".join(f"<th {_LEFT}>{name}</th>" for name in ("operator", "node", "reads", "writes"))
        rows = "".join(
            f"<tr><td {_LEFT}><b>{html.escape(node.op)}</b></td><td {_LEFT}>{html.escape(node.name)}</td>"
            f"<td {_LEFT}>{_tensors(node.inputs)}</td><td {_LEFT}>{_tensors(node.outputs)}</td></tr>"
            for node in self
        )
        return {"text/plain": str(self), "text/html": f"<table><tr>{head}</tr>{rows}</table>"}


def _report_row(report: PassReport) -> str:
    operators = ", ".join(f"{op} {change:+d}" for op, change in report.diff.ops.items())
    misses = "".join(
        f"<br><small>not {html.escape(miss.node)}: {html.escape(miss.reason)}</small>" for miss in report.near_misses
    )
    return (
        f"<tr><td {_LEFT}><b>{html.escape(report.name)}</b><br><small>{html.escape(report.summary)}</small>{misses}</td>"
        f"<td {_LEFT}>{report.rewrites} of {report.matches}</td>"
        f"<td {_LEFT}>{report.nodes_before} → {report.nodes_after}</td>"
        f"<td {_LEFT}><small>{html.escape(operators)}</small></td><td {_LEFT}>{report.seconds:.2f} s</td></tr>"
    )


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
