"""Large linear layers as nodes of their own, for kernels that run between the parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, other, producer, scope
from llmlab.graph.graph import LLMLAB_DOMAIN
from llmlab.graph.linear import Linear, linear
from llmlab.graph.lower.tensorrt_integers import Dequantized, IntegerWeight, behind_casts, integer_weight, rounded_rows
from llmlab.graph.lower.weights import can_evaluate
from llmlab.graph.passes.convert_precision import WIDE, TensorTypes
from llmlab.graph.quantized import quantized

PRODUCT = "Product"
"""Inputs x [rows, K], weight [N', K], bias [N'] or none, add [rows, N] or none, scale or none; attributes `gate`, `out_dtype`,
`weight_dtype`, `group` and `x` (int8 where its rows are rounded first).
N' is N, or with a gate 2N: the gate's rows, then those of what it multiplies."""
GATES = ("silu", "gelu", "gelu_tanh", "relu")
MULTIPLE = 16
"""What the kernels ask of K and N, and of where columns begin."""


def mark_products(edit: Editor, dtype: str, weak: bool, wide: Collection[str]) -> None:
    """Each linear layer on rows of tokens → a Product, with its bias, the residual that is added or the gate behind it.

    dtype: float16 or bfloat16, what products compute in. Weights may be int8 or int4 (`IntegerWeight`), and int8 ones may be
    multiplied by rows that are rounded to int8 in the step. What has no kernel stays: products in float32 (routers), of sizes
    that are not multiples of 16, of tensors that are quantized in other ways, experts.
    weak: the graph is in float32; products and what is looked up are narrow but for the nodes whose names are in `wide`.
    """
    marker = _Marker(edit, np.dtype(dtype), weak, wide if weak else ())
    for node in list(edit.surgeon.nodes):
        if node.op == "Gather":
            marker.narrow_table(node)
        elif node.op == "MatMul" and (layer := linear(node)) is not None and marker.fits(layer):
            marker.mark(layer)
    edit.surgeon.cleanup()


@dataclass
class _Found:
    """A product while it grows: what it reads, gives, and the nodes that it replaces."""

    weight: gs.Tensor | IntegerWeight
    bias: gs.Tensor | None
    out: gs.Tensor
    width: int
    replaced: list[gs.Node]
    gate: str = ""
    add: gs.Tensor | None = None
    out_dtype: str = ""


class _Marker:
    def __init__(self, edit: Editor, dtype: np.dtype, weak: bool, wide: Collection[str]) -> None:
        self._edit, self._dtype, self._weak, self._wide = edit, dtype, weak, wide
        self._types = TensorTypes(edit, dtype, check_weights=False)

    def narrow_table(self, node: gs.Node) -> None:
        """What tokens and positions are looked up in is stored narrow, and not as integers, so that a head tied to it is the same weight."""
        table = node.inputs[0]
        if (
            stored := quantized(table)
        ) is not None:  # looked up as what it stands for: a lookup gains nothing from integers
            node.inputs[0] = gs.Constant(self._edit.name(f"{node.name}/table"), Dequantized(stored, self._dtype))
        elif self._weak and node.name not in self._wide and table.dtype == WIDE and can_evaluate(table):
            node.inputs[0] = self._types.cast(table, self._dtype)

    def fits(self, layer: Linear) -> bool:
        node = layer.node
        x, out = node.inputs[0], node.outputs[0]
        shapes = [list(t.shape or ()) for t in (x, out)]
        return bool(
            node.name not in self._wide
            and x.dtype == out.dtype == (WIDE if self._weak else self._dtype)
            and all(len(s) == 2 and s[0] in ("T", "N") for s in shapes)
            and layer.depth % MULTIPLE == layer.width % MULTIPLE == 0
            and not constant_expression(x)
            and self._kernel_reads(layer)
        )

    def _kernel_reads(self, layer: Linear) -> bool:
        """Whether there is a kernel for the types of this weight, and of x."""
        x = layer.node.inputs[0]
        if producer(behind_casts(x), "DequantizeLinear") is None:
            return can_evaluate(layer.weight) or integer_weight(layer) is not None
        rows, integers = rounded_rows(x), integer_weight(layer)
        return rows is not None and rows.dtype == x.dtype and integers is not None and integers.by_row

    def mark(self, layer: Linear) -> None:
        edit, node, where = self._edit, layer.node, scope(layer.node)
        rounded = rounded_rows(node.inputs[0])
        integers = integer_weight(layer)
        found = _Found(integers or self._float_weight(where, layer), None, node.outputs[0], layer.width, [node])
        if layer.bias is not None and list(layer.bias.shape) == [layer.width] and can_evaluate(layer.bias):
            found.bias, found.out = self._types.cast(layer.bias, self._dtype), layer.out
            found.replaced.append(layer.out.inputs[0])
        self._take_reader(where, found)
        self._choose_type(found)
        attrs = {
            "gate": found.gate,
            "out_dtype": found.out_dtype,
            "weight_dtype": self._dtype.name,
            "group": 0,
            "x": "",
        }
        inputs = [rounded or node.inputs[0], None, found.bias, found.add, None]
        if isinstance(found.weight, IntegerWeight):
            attrs |= {"weight_dtype": found.weight.dtype, "group": found.weight.group, "x": "int8" if rounded else ""}
            inputs[1], inputs[4] = found.weight.constants(edit, where, as_they_are=rounded is not None)
        else:
            inputs[1] = found.weight
        shape = [found.out.shape[0], found.width]
        made = edit.add(PRODUCT, where, inputs, attrs, dtype=found.out.dtype, shape=shape, domain=LLMLAB_DOMAIN)
        edit.replace(found.out, made)
        for old in found.replaced:
            old.inputs.clear()
            old.outputs.clear()

    def _float_weight(self, where: str, layer: Linear) -> gs.Tensor:
        weight = self._types.cast(layer.weight, self._dtype)
        if layer.transposed:
            return weight
        shape = [layer.width, layer.depth]
        return self._edit.add("Transpose", where, [weight], {"perm": [1, 0]}, dtype=self._dtype, shape=shape)

    def _take_reader(self, where: str, found: _Found) -> None:
        """The gate behind the product, or the residual that is added to it."""
        reader, out = self._only_reader(found.out), found.out
        if reader is None:
            return
        if reader.op == "GatedActivation" and self._order_gate(where, reader, found):
            found.gate, found.width = reader.attrs["activation"], found.width // 2
        elif reader.op == "Add" and reader.name not in self._wide and self._is_residual(reader, out):
            found.add = other(reader, out)
        else:
            return
        found.out = reader.outputs[0]
        found.replaced.append(reader)

    def _only_reader(self, tensor: gs.Tensor) -> gs.Node | None:
        return tensor.outputs[0] if len(tensor.outputs) == 1 and not self._edit.is_output(tensor) else None

    @staticmethod
    def _is_residual(node: gs.Node, out: gs.Tensor) -> bool:
        added = other(node, out)
        shapes = [list(t.shape or ()) for t in (added, out, node.outputs[0])]
        same = shapes[0] == shapes[1] == shapes[2] and added.dtype == out.dtype == node.outputs[0].dtype
        return same and not constant_expression(added)

    def _order_gate(self, where: str, node: gs.Node, found: _Found) -> bool:
        """Put the gate's rows first in weight and bias; False where a kernel can't compute this gate."""
        width = found.width // 2
        if node.attrs["activation"] not in GATES or float(node.attrs["alpha"]) != 1 or width % MULTIPLE:
            return False
        if node.attrs["gate_first"]:
            return True
        if isinstance(found.weight, IntegerWeight):
            return False
        tensors = [found.weight] if found.bias is None else [found.weight, found.bias]
        joins = [producer(t, "Concat") for t in tensors]
        if any(j is None or j.attrs["axis"] != 0 or [t.shape[0] for t in j.inputs] != [width] * 2 for j in joins):
            return False
        swapped = [
            self._edit.add("Concat", where, join.inputs[::-1], {"axis": 0}, dtype=self._dtype, shape=tensor.shape)
            for join, tensor in zip(joins, tensors, strict=True)
            if join is not None
        ]
        found.weight, found.bias = swapped[0], swapped[1] if len(swapped) > 1 else None
        return True

    def _choose_type(self, found: _Found) -> None:
        """float32 for what gives the logits, maybe through a softcap; else what products compute in."""
        found.out_dtype = self._dtype.name
        if found.gate or found.add is not None:
            return
        readers = list(found.out.outputs)
        if self._weak:
            after = bool(readers) and all(r.name in self._wide and not r.op.endswith("Normalization") for r in readers)
            if after or self._edit.is_output(found.out):
                found.out_dtype = WIDE.name
        elif len(readers) == 1 and readers[0].op == "Cast" and readers[0].outputs[0].dtype == WIDE:
            found.out_dtype, found.out = WIDE.name, readers[0].outputs[0]
            found.replaced.append(readers[0])
