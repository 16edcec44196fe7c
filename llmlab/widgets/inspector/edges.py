"""The tensors that go between rows of the inspector's tree, into them and out of them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import onnx_graphsurgeon as gs

from llmlab.widgets.inspector.hierarchy import Fold, Leaf


class Edges(NamedTuple):
    """What goes between rows: key of the row by node; tensors by pair of rows; those from outside with the rows that read them;
    those that leave with the row that makes them."""

    names: dict[int, str]
    inner: dict[tuple[str, str], dict[int, gs.Tensor]]
    inward: dict[int, tuple[gs.Tensor, dict[str, None]]]
    outward: dict[int, tuple[gs.Tensor, str]]


def find_edges(rows: Sequence[Leaf | Fold], keys: Sequence[str], outputs: Container[int]) -> Edges:
    """Look at each node of the rows once. keys: of the rows; outputs: ids of the graph's output tensors."""
    names: dict[int, str] = {}
    for row, key in zip(rows, keys, strict=True):
        for leaf in [row] if isinstance(row, Leaf) else row.leaves:
            names[id(leaf.node)] = key
    inner: dict[tuple[str, str], dict[int, gs.Tensor]] = {}
    inward: dict[int, tuple[gs.Tensor, dict[str, None]]] = {}
    outward: dict[int, tuple[gs.Tensor, str]] = {}
    for row, key in zip(rows, keys, strict=True):
        for leaf in [row] if isinstance(row, Leaf) else row.leaves:
            for tensor in leaf.node.inputs:
                if isinstance(tensor, gs.Constant) or tensor.is_empty():
                    continue
                maker = tensor.inputs[0] if tensor.inputs else None
                if maker is not None and maker.op == "Constant":
                    continue
                source = names.get(id(maker)) if maker is not None else None
                if source is None:
                    inward.setdefault(id(tensor), (tensor, {}))[1][key] = None
                elif source != key:
                    inner.setdefault((source, key), {})[id(tensor)] = tensor
            for tensor in leaf.node.outputs:
                if id(tensor) in outputs:
                    outward[id(tensor)] = (tensor, key)
                    continue
                for reader in tensor.outputs:  # no generator: this is all of a model's tensors
                    if id(reader) not in names:
                        outward[id(tensor)] = (tensor, key)
                        break
    return Edges(names, inner, inward, outward)
