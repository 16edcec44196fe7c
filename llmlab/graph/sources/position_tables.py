"""Tables that positions are looked up in: are they as long as the config says that sequences get?"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import InputError
from llmlab.graph.analysis.evaluate import CannotEvaluate, PositionFunction
from llmlab.graph.edit import producer


def check_position_tables(graph: gs.Graph, longest: int) -> None:
    """InputError where a position below `longest` has no row in a table of the plain `graph`: an engine would find out
    only when a sequence gets that long."""
    for node in graph.nodes:
        if node.op != "Gather" or node.attrs.get("axis", 0) != 0 or (rows := _rows(node.inputs[0])) is None:
            continue
        function = PositionFunction([node.inputs[1]])
        if not function.sources or function.dependence() is not None:
            continue
        try:
            (index,) = function(np.arange(longest)[None])
        except CannotEvaluate:
            continue
        if index.size and index.max() >= rows:
            fits = int(np.argmax(index.reshape(-1) >= rows))
            raise InputError(
                f"{node.name} looks positions up in a table of {rows} rows, enough for {fits} tokens, and the config has "
                f"sequences of up to {longest} (max_position_embeddings): correct it, or pass max_seq_len={fits}"
            )


def _rows(tensor: gs.Tensor) -> int | None:
    """Rows of a stored table, also of one that is stored narrower than it is read."""
    cast = producer(tensor, "Cast")
    stored = cast.inputs[0] if cast is not None else tensor
    return int(stored.shape[0]) if isinstance(stored, gs.Constant) and len(stored.shape) > 1 else None
