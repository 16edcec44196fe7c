"""`llmlab.inspect`: look into a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.widgets.inspector.panel import Inspector
from llmlab.widgets.panel import Panel


def inspect(what: Any, *, times: Mapping[str, float] | None = None, reference: Graph | None = None) -> Panel:
    """An instrument panel that shows what is in a graph: layers, blocks, nodes, tensors, weights.

    what: a Graph. times: seconds by name of a node, to lay over it. reference: the graph that a quantized one was made of, for the
    error of each weight. Raises InputError.
    """
    if isinstance(what, Graph):
        if reference is not None and not isinstance(reference, Graph):
            raise InputError(f"reference is a {type(reference).__name__}, expected the Graph before llmlab.quantize")
        return Inspector(what, times=times, reference=reference)
    raise InputError(f"inspect got a {type(what).__name__}, expected a Graph: open a folder with llmlab.Graph.load")
