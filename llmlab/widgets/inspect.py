"""`llmlab.inspect`: look into a graph, or into engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmlab.errors import InputError
from llmlab.evaluate.layers.model import EngineLayers
from llmlab.graph.graph import Graph
from llmlab.runtime.engine import Engine
from llmlab.widgets.engine_view.panel import view_engines
from llmlab.widgets.inspector.panel import Inspector
from llmlab.widgets.panel import Panel


def inspect(
    what: Graph | Engine | EngineLayers,
    other: Engine | EngineLayers | None = None,
    *,
    times: Mapping[str, float] | None = None,
    engine: Any = None,
    reference: Graph | None = None,
    **options: Any,
) -> Panel:
    """An instrument panel that shows what is in a graph (layers, blocks, nodes, tensors, weights), or what an engine runs.

    what: a Graph; or an Engine (or what `llmlab.layers` measured of it), alone or against an `other` of the same model. Of a graph: times: seconds by name of a node, to
    lay over it; engine: an engine (or its folder) that was built of this graph, which the panel can then measure; reference:
    the graph that a quantized one was made of, for the error of each weight. options: of an engine, as `llmlab.layers` takes.
    Raises InputError.
    """
    if isinstance(what, (Engine, EngineLayers)):
        given = [
            name
            for name, value in (("times", times), ("engine", engine), ("reference", reference))
            if value is not None
        ]
        if given:
            raise InputError(f"inspect of an engine takes no {given[0]}=; that is for graphs")
        return view_engines(*((what,) if other is None else (what, other)), **options)
    if not isinstance(what, Graph):
        raise InputError(
            f"inspect got a {type(what).__name__}, expected a Graph or an Engine: open a folder with llmlab.Graph.load or llmlab.Engine.load"
        )
    if other is not None or options:
        raise InputError(f"inspect of a graph takes no {next(iter(options), 'other')}; that is for engines")
    if reference is not None and not isinstance(reference, Graph):
        raise InputError(f"reference is a {type(reference).__name__}, expected the Graph before llmlab.quantize")
    return Inspector(what, times=times, engine=engine, reference=reference)
