"""Products that read the same tokens become one: QKV, gate and up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmlab.graph.edit import Editor, scope
from llmlab.graph.linear import Linear, linear, product
from llmlab.graph.rewrite import Match, Pass


class MergeProducts(Pass):
    """Linear layers on the same input → one product and a Split; the weights stay apart until a target joins them."""

    name = "merge_products"

    def find(self, edit: Editor) -> Iterator[Match]:
        groups: dict[tuple[int, bool], list[Linear]] = {}
        for node in edit.surgeon.nodes:
            if (layer := linear(node)) is not None:
                groups.setdefault((id(node.inputs[0]), layer.transposed), []).append(layer)
        for layers in groups.values():
            modules: dict[str, list[Linear]] = {}
            for layer in layers:  # attention and MLP read the same tokens where a model runs them side by side
                modules.setdefault(_module(layer), []).append(layer)
            several = [group for group in modules.values() if len(group) > 1]
            for group in several or [layers]:
                if len(group) > 1:
                    yield Match(node=group[0].node, layers=group)

    def check(self, edit: Editor, match: Match) -> str | None:
        layers: list[Linear] = match.layers
        if len({layer.bias is None for layer in layers}) != 1:
            return "some of the products have a bias and some have none"
        if len({str(layer.weight.dtype) for layer in layers}) != 1:
            return "the weights have different types"
        if len({_module(layer) for layer in layers}) != 1:
            return f"they belong to different modules: {', '.join(scope(layer.node) for layer in layers)}"
        if any(edit.is_output(layer.out) for layer in layers):
            return "one of the products is an output"
        return None

    def rewrite(self, edit: Editor, match: Match) -> None:
        layers: list[Linear] = match.layers
        first = layers[0]
        where = _module(first)
        widths = [layer.width for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        x, dtype = first.node.inputs[0], first.out.dtype
        whole = product(edit, where, x, [layer.weight for layer in layers], biases, first.transposed, dtype)
        sizes = edit.constant(f"{where}/widths", np.asarray(widths, np.int64))
        rows = list(x.shape or ())[:-1]
        parts = edit.add_many("Split", where, [whole, sizes], {"axis": -1}, [(dtype, [*rows, w]) for w in widths])
        for layer, part in zip(layers, parts, strict=True):
            edit.replace(layer.out, part)


def _module(layer: Linear) -> str:
    """The module that holds the layer: `model.layers.0.self_attn`."""
    return scope(layer.node).rpartition(".")[0]
