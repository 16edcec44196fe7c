"""GatedActivation as standard operators, for a target without a kernel of its own for it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, scope


def expand_gated(edit: Editor) -> None:
    """Each GatedActivation → Split, the activation and Mul."""
    for node in [n for n in edit.surgeon.nodes if n.op == "GatedActivation"]:
        where, out = scope(node), node.outputs[0]
        width = int(out.shape[-1])
        sizes = edit.constant(f"{where}/widths", np.array([width, width], np.int64))
        halves = edit.add_many("Split", where, [node.inputs[0], sizes], {"axis": -1}, [(out.dtype, out.shape)] * 2)
        gate, up = halves if node.attrs["gate_first"] else halves[::-1]
        active = activate(edit, where, node.attrs["activation"], float(node.attrs["alpha"]), gate)
        edit.replace(out, edit.add("Mul", where, [active, up], dtype=out.dtype, shape=out.shape))
        node.outputs.clear()


def activate(edit: Editor, where: str, kind: str, alpha: float, x: gs.Variable) -> gs.Variable:
    """Nodes for one of `kernels.activations.ACTIVATIONS`; `alpha` is silu's."""

    def add(op: str, *inputs: gs.Tensor, **attrs: str) -> gs.Variable:
        return edit.add(op, where, list(inputs), attrs, dtype=x.dtype, shape=x.shape)

    if kind in ("gelu", "gelu_tanh"):
        return add("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind in ("relu", "sigmoid"):
        return add(kind.capitalize(), x)
    scaled = x if alpha == 1 else add("Mul", x, edit.constant(f"{where}/alpha", np.asarray(alpha, x.dtype)))
    return add("Mul", x, add("Sigmoid", scaled))
