"""How far each quantized weight is from the one that it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.graph import Graph
from llmlab.graph.quantized import QuantizedWeight, quantized
from llmlab.graph.store.deferred import DeferredValues
from llmlab.graph.store.storage import constants
from llmlab.widgets.inspector.hierarchy import Leaf
from llmlab.widgets.inspector.values import SAMPLE, pieces


def weight_errors(
    leaves: Iterable[Leaf], reference: Graph
) -> Iterator[tuple[int, int, str, tuple[float, float] | None]]:
    """(done, total, node, (squared error, squared weight)) of each DequantizeLinear of a weight; None instead of the numbers where
    `reference` has no weight of this name and shape. Of large weights a sample of rows is compared.

    A factor that was folded into the weight (AWQ, SmoothQuant) counts as error: compare with a graph that has it, too.
    """
    wide = {c.name: c for c in constants(reference.surgeon)}
    todo = [
        (leaf, weight)
        for leaf in leaves
        if leaf.node.op == "DequantizeLinear" and (weight := quantized(leaf.node.outputs[0])) is not None
    ]
    for done, (leaf, weight) in enumerate(todo, 1):
        name = weight.values.name
        partner = wide.get(name) or wide.get(name.rpartition(".")[0])
        fits = partner is not None and tuple(partner.shape) == weight.shape
        yield done, len(todo), leaf.name, squares(weight, partner) if partner is not None and fits else None


def squares(weight: QuantizedWeight, partner: gs.Constant) -> tuple[float, float]:
    """(sum of squared differences, sum of squared wide weights), over a sample of rows of a large one."""
    values = partner._values.load() if isinstance(partner._values, DeferredValues) else partner._values
    error = norm = 0.0
    for part, rows in pieces(weight, SAMPLE):
        exact = np.asarray(values[rows] if weight.shape else values).astype(np.float32)
        error += float(np.sum(np.square(exact - part.dequantize()), dtype=np.float64))
        norm += float(np.sum(np.square(exact), dtype=np.float64))
    return error, norm
