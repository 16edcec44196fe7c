"""Which tensors depend on where tokens stand, and on nothing else about them."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def depends_on_positions(graph: gs.Graph) -> dict[int, bool]:
    """By a tensor's id: True where it depends on positions and sizes alone, False where on tokens. Constants are absent.

    The graph is in topological order.
    """
    kinds = {id(t): t.name == "position_ids" for t in graph.inputs}
    for node in graph.nodes:
        given = [kinds[id(t)] for t in node.inputs if id(t) in kinds]
        if given:
            kind = node.op in ("Shape", "Size") or all(given)
            kinds.update((id(t), kind) for t in node.outputs)
    return kinds
