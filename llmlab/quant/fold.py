"""Factors between a product and what comes before it: the input is divided by s, the weights are multiplied, the model stays the same.

The division goes where it costs nothing: into the weight of the norm before, or into the rows of the product before (up_proj
before down_proj, v_proj before o_proj). Where it can't, the input goes through a Mul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, is_bfloat16, operand, producer, scope
from llmlab.graph.linear import Linear, linear
from llmlab.graph.lower.weights import evaluate
from llmlab.quant.projections import Projection

_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Fold:
    """Where the factor of an input can go.

    kind: `norm`, `rows` or `mul`. node: the norm, or the product before. channels [K]: for `rows`, the row of that product (its projections laid one
    after another) that each channel of the input comes from; channels of one row need one factor.
    """

    kind: str
    node: gs.Node
    channels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def tied(self, per_channel: np.ndarray) -> np.ndarray:
        """Statistics [K] where channels that need one factor have one number: the largest."""
        if self.kind != "rows":
            return per_channel
        most = np.zeros(int(self.channels.max()) + 1, per_channel.dtype)
        np.maximum.at(most, self.channels, per_channel)
        return np.asarray(most[self.channels])


def find_fold(products: Sequence[gs.Node]) -> Fold:
    """Where a factor of the input that `products` (MatMul nodes, all that read it) share can go."""
    x = products[0].inputs[0]
    mul = Fold("mul", products[0])
    before = producer(x)
    readers = products
    while before is not None and _passes(before) and _only(x, readers):
        x, readers = before.inputs[0], [before]
        before = producer(x)
    if before is None or not _only(x, readers):
        return mul
    if before.op in _NORMS and constant_expression(before.inputs[1]):
        bias = operand(before, 2)
        return Fold("norm", before) if bias is None or constant_expression(bias) else mul
    if before.op == "GatedActivation":
        made, width = before.inputs[0], int(x.shape[-1])
        first = width if before.attrs["gate_first"] else 0
        return _rows(made, [before], first + np.arange(width)) or mul
    if before.op == "PagedAttention" and x is before.outputs[0]:
        heads, kv_heads, dim = (int(before.attrs[n]) for n in ("num_heads", "kv_num_heads", "head_dim"))
        channel = np.arange(heads * dim)
        rows = channel // dim // (heads // kv_heads) * dim + channel % dim
        v = before.inputs[2]
        split = producer(v, "Split")
        if split is None:
            return _rows(v, [before], rows) or mul
        if not _only(v, [before]):
            return mul
        offset = sum(int(t.shape[-1]) for t in split.outputs[: [id(t) for t in split.outputs].index(id(v))])
        return _rows(split.inputs[0], [split], offset + rows) or mul
    return mul


def _passes(node: gs.Node) -> bool:
    """Whether a node gives some rows of what it reads (those whose logits are wanted), or the same in another type of floats."""
    if node.op == "Gather":
        return node.attrs.get("axis", 0) == 0 and not constant_expression(node.inputs[0])
    return node.op == "Cast" and all(
        is_bfloat16(t) or np.dtype(t.dtype).kind == "f" for t in (node.inputs[0], node.outputs[0])
    )


def _only(tensor: gs.Tensor, readers: Sequence[gs.Node]) -> bool:
    """Whether nothing but `readers` reads a tensor of the graph's."""
    return {id(n) for n in tensor.outputs} <= {id(n) for n in readers}


def _rows(made: gs.Tensor, readers: Sequence[gs.Node], channels: np.ndarray) -> Fold | None:
    layer = _layer(made)
    if layer is None or not _only(made, readers):
        return None
    return Fold("rows", layer.node, channels)


def _layer(made: gs.Tensor) -> Linear | None:
    """The linear layer whose result is `made`."""
    node = producer(made, "MatMul", "Add")
    if node is None:
        return None
    products = [node] if node.op == "MatMul" else [p for t in node.inputs if (p := producer(t, "MatMul")) is not None]
    layers = [found for p in products if (found := linear(p)) is not None and found.out is made]
    return layers[0] if len(layers) == 1 else None


def fold_factor(
    edit: Editor, given: Sequence[Projection], factor: np.ndarray, fold: Fold, everything: Sequence[Projection]
) -> dict[str, np.ndarray]:
    """Divide the input that the projections `given` (all of their products') share by `factor` [K], and multiply their columns.

    everything: all projections of the graph. Weights become constant expressions, computed when they are written. Gives back, by name, the
    factors [N] by which rows of projections before were multiplied.
    """
    factor = np.asarray(factor, np.float32)
    rows: dict[str, np.ndarray] = {}
    if fold.kind == "norm":
        for index in (1, 2):
            if (tensor := operand(fold.node, index)) is not None:
                values = evaluate(tensor)
                fold.node.inputs[index] = edit.constant(
                    f"{tensor.name}.divided", (values / factor).astype(values.dtype)
                )
    elif fold.kind == "rows":
        rows = _divide_rows(edit, fold, factor, everything)
    else:
        products = list({id(p.node): p.node for p in given}.values())
        x = products[0].inputs[0]
        by = edit.constant(f"{given[0].name}.input.factor", (1 / factor).astype(x.dtype))
        divided = edit.add("Mul", scope(products[0]), [x, by], dtype=x.dtype, shape=x.shape)
        edit.replace(x, divided, only=products)
    for projection in given:
        _multiply(edit, projection, factor, columns=True)
    return rows


def _divide_rows(
    edit: Editor, fold: Fold, factor: np.ndarray, everything: Sequence[Projection]
) -> dict[str, np.ndarray]:
    layer = linear(fold.node)
    assert layer is not None
    by = np.ones(layer.width, np.float32)
    by[fold.channels] = 1 / factor
    found: dict[str, np.ndarray] = {}
    parts = [p for p in everything if p.node is fold.node]
    for projection, own in zip(parts, np.split(by, np.cumsum([p.shape[0] for p in parts])[:-1]), strict=True):
        if (own != 1).any():
            found[projection.name] = own
            _multiply(edit, projection, own, columns=False)
    if layer.bias is not None:
        values = evaluate(layer.bias)
        divided = edit.constant(f"{layer.bias.name}.divided", (values * by).astype(values.dtype))
        edit.replace(layer.bias, divided, only=[layer.out.inputs[0]])
    return found


def _multiply(edit: Editor, projection: Projection, factor: np.ndarray, *, columns: bool) -> None:
    """Let the weight be a constant expression: itself times a factor of its columns [K] or rows [N]."""
    weight = projection.reader.inputs[projection.index]
    last = columns == projection.transposed
    shaped = np.asarray(factor if last else factor[:, None], weight.dtype)
    by = edit.constant(f"{projection.name}.{'columns' if columns else 'rows'}", shaped)
    wide = edit.add("Mul", projection.name, [weight, by], dtype=weight.dtype, shape=weight.shape)
    projection.reader.inputs[projection.index] = wide
