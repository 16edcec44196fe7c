"""Weights and activations in half precision; what needs float32 keeps it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.errors import UnsupportedModelError
from llmlab.graph.edit import Editor, constant_expression, operand, scope, sort_nodes, value
from llmlab.graph.graph import Graph
from llmlab.graph.linear import is_embedding
from llmlab.graph.narrow import Narrowed, NarrowedScale, check_range, survives
from llmlab.graph.passes.drop_batch_axis import ELEMENTWISE
from llmlab.graph.rewrite import Match, Pass
from llmlab.graph.store.storage import onnx_dtype

WIDE = np.dtype(np.float32)
# Layout, and elementwise operators that lose nothing but a rounding: they compute in whatever their inputs come in.
_CURVES = frozenset(("Abs", "Cos", "Exp", "Log", "Mod", "Pow", "Reciprocal", "Sin", "Softplus", "Cast"))
_EITHER = (ELEMENTWISE - _CURVES) | frozenset(
    ("Concat", "Expand", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
# These take half precision and compute inside in float32: products accumulate, norms and attention have it in their
# definition. The inputs named stay wide: RoPE tables, ALiBi slopes, sinks; the weights that a router gives.
_NARROW = frozenset(
    (
        "GatedActivation",
        "Gelu",
        "LayerNormalization",
        "MatMul",
        "MixtureOfExperts",
        "PagedAttention",
        "RMSNormalization",
    )
)
QUANTIZED = frozenset(("QuantizeLinear", "DequantizeLinear"))
"""Of an activation. They round in the type of their scale."""
_WIDE_INPUTS = {"PagedAttention": (8, 9, 10, 11, 12, 13), "MixtureOfExperts": (2,)}


class ConvertPrecision(Pass):
    """float32 → float16 or bfloat16; norms and softmax compute wide inside, RoPE, routers and logits altogether."""

    name = "convert_precision"

    def __init__(self, dtype: np.dtype, check_weights: bool = True) -> None:
        """check_weights: read every weight, to refuse what is beyond float16's range."""
        self.dtype = np.dtype(dtype)
        self.check_weights = check_weights

    def find(self, edit: Editor) -> Iterator[Match]:
        if edit.surgeon.nodes:
            yield Match(node=edit.surgeon.nodes[0])

    def rewrite(self, edit: Editor, match: Match) -> None:
        surgeon = sort_nodes(edit.surgeon)
        live = [n for n in surgeon.nodes if not all(constant_expression(t) for t in n.inputs) or not n.inputs]
        wide = _wide_before(edit, live)
        types = TensorTypes(edit, self.dtype, self.check_weights)
        for tensor in surgeon.inputs:
            if _is_wide(tensor):
                tensor.dtype = self.dtype
        for node in live:
            self._convert(node, id(node) in wide, types)
        for i, tensor in enumerate(surgeon.outputs):
            if tensor.dtype == self.dtype and not tensor.name.startswith("kv_cache."):
                name, tensor.name = tensor.name, edit.name(f"{tensor.name}.narrow")
                surgeon.outputs[i] = types.cast(tensor, WIDE)
                surgeon.outputs[i].name = name

    def _convert(self, node: gs.Node, wide: bool, types: TensorTypes) -> None:
        if any(isinstance(v, gs.Graph) for v in node.attrs.values()):
            raise UnsupportedModelError(f"{node.name}: {node.op} has a graph inside; only plain nodes can be converted")
        if node.op == "Cast" and not _is_float(node.inputs[0]):
            return
        if node.op in QUANTIZED and not isinstance(node.inputs[1], gs.Constant):
            target = WIDE  # a scale that the step computes
        elif node.op in _NARROW | QUANTIZED and not wide:
            target = self.dtype
        elif node.op == "Gather":
            narrow = is_embedding(node, types.hidden) or node.inputs[0].dtype == self.dtype
            target = self.dtype if narrow else WIDE
        elif node.op in _EITHER and not wide:
            mixed = any(_is_wide(t) and not constant_expression(t) for t in node.inputs)
            target = WIDE if mixed or not all(survives(value(t), self.dtype) for t in node.inputs) else self.dtype
        else:
            target = WIDE
        kept = _WIDE_INPUTS.get(node.op, ())
        for i in range(len(node.inputs)):
            if (tensor := operand(node, i)) is not None and _is_float(tensor):
                node.inputs[i] = types.cast(tensor, WIDE if i in kept else target)
        for out in node.outputs:
            if _is_wide(out):
                out.dtype = target


def computes_wide(graph: Graph, dtype: np.dtype) -> set[str]:
    """Names of the nodes of a float32 graph that would stay in float32 in `dtype`: routers, RoPE, what follows the head, and
    norms, which do so inside. The graph is not changed, and no large weight is read."""
    narrow = graph.copy()
    edit = Editor(narrow)
    named = {n.name for n in edit.surgeon.nodes if not all(constant_expression(t) for t in n.inputs)}
    ConvertPrecision(dtype, check_weights=False).rewrite(edit, Match(node=None))
    wide = {n.name for n in edit.surgeon.nodes if any(_is_wide(t) for t in n.outputs) or n.op.endswith("Normalization")}
    return wide & named


class TensorTypes:
    """Every tensor in each type once: a Cast behind a variable, another constant in place of a constant."""

    def __init__(self, edit: Editor, narrow: np.dtype, check_weights: bool) -> None:
        self._edit, self._narrow, self._check_weights = edit, narrow, check_weights
        self._made: dict[tuple[int, np.dtype], gs.Tensor] = {}
        self.hidden = edit.graph.config.hidden_size

    def cast(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
        if tensor.dtype == dtype:
            return tensor
        key = (id(tensor), dtype)
        if key not in self._made:
            constant = dtype == self._narrow and constant_expression(tensor)
            self._made[key] = self._constant(tensor) if constant else self._cast(tensor, dtype)
        return self._made[key]

    def _cast(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Variable:
        where = scope(tensor.inputs[0]) if tensor.inputs else ""
        return self._edit.add("Cast", where, [tensor], {"to": onnx_dtype(dtype)}, dtype=dtype, shape=tensor.shape)

    def _constant(self, tensor: gs.Tensor) -> gs.Tensor:
        """A constant expression in the narrow type: a Cast in it goes, so that a weight stored so is read as it is."""
        if isinstance(tensor, gs.Constant):
            if self._check_weights:
                check_range(tensor, self._narrow)
            return gs.Constant(self._edit.name(f"{tensor.name}.{self._narrow}"), Narrowed(tensor, self._narrow))
        node = tensor.inputs[0]
        if node.op == "Cast" and _is_float(node.inputs[0]):
            return self.cast(node.inputs[0], self._narrow)
        if node.op == "DequantizeLinear":
            given = [t if t is None or not _is_float(t) else self._scale(t) for t in node.inputs]
            return self._edit.add(node.op, scope(node), given, node.attrs, dtype=self._narrow, shape=tensor.shape)
        if node.op not in ("Concat", "Identity", "Reshape", "Transpose"):
            return self._cast(tensor, self._narrow)  # arithmetic: computed wide, then rounded once
        inputs = [self.cast(t, self._narrow) if _is_float(t) else t for t in node.inputs]
        return self._edit.add(node.op, scope(node), inputs, node.attrs, dtype=self._narrow, shape=tensor.shape)

    def _scale(self, scale: gs.Tensor) -> gs.Tensor:
        return gs.Constant(self._edit.name(f"{scale.name}.{self._narrow}"), NarrowedScale(scale, self._narrow))


def _wide_before(edit: Editor, live: list[gs.Node]) -> set[int]:
    """Nodes whose every reader wants float32, so that they compute in it: what turns a product into logits or into a
    choice of experts, and that choice's product too."""
    wide: set[int] = set()
    for node in reversed(live):
        readers = [r for out in node.outputs for r in out.outputs]
        logits = any(edit.is_output(t) and not t.name.startswith("kv_cache.") for t in node.outputs)
        if not readers and not logits:
            continue
        if not all(id(r) in wide or _always_wide(r) for r in readers):
            continue
        if node.op in _EITHER or (node.op == "MatMul" and any(n.op == "TopK" for n in _below(node, wide))):
            wide.add(id(node))
    return wide


def _always_wide(node: gs.Node) -> bool:
    return node.op not in _EITHER | _NARROW | {"Gather"}


def _below(node: gs.Node, wide: set[int]) -> list[gs.Node]:
    """The wide nodes that `node` reaches through wide nodes."""
    found: dict[int, gs.Node] = {}
    pending = [node]
    while pending:
        for reader in (r for out in pending.pop().outputs for r in out.outputs):
            if id(reader) not in found and (id(reader) in wide or _always_wide(reader)):
                found[id(reader)] = reader
                pending.append(reader)
    return list(found.values())


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).name in ("float16", "bfloat16", "float32")


def _is_wide(tensor: gs.Tensor) -> bool:
    return tensor.dtype == WIDE
