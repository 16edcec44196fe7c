"""RMS norms of rows as nodes of their own, for a kernel that runs between the parts."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from llmlab.graph.edit import Editor, constant_expression, scope
from llmlab.graph.graph import LLMLAB_DOMAIN
from llmlab.graph.lower.tensorrt_products import MULTIPLE
from llmlab.graph.lower.weights import can_evaluate
from llmlab.graph.passes.convert_precision import WIDE

NORM = "RowNorm"
"""Inputs x [rows, K], weight [K]; attribute `epsilon`."""
_MOST_WIDTH = 1 << 15


def mark_norms(edit: Editor, dtype: str, weak: bool) -> None:
    """Each RMSNormalization of whole rows → a RowNorm. Norms of heads and of odd widths stay. `dtype` and `weak` as for products."""
    kind = WIDE if weak else np.dtype(dtype)
    for node in [n for n in edit.surgeon.nodes if n.op == "RMSNormalization"]:
        if not _fits(node, kind):
            continue
        out = node.outputs[0]
        attrs = {"epsilon": float(node.attrs.get("epsilon", 1e-5))}
        made = edit.add(
            NORM, scope(node), list(node.inputs), attrs, dtype=out.dtype, shape=out.shape, domain=LLMLAB_DOMAIN
        )
        edit.replace(out, made)
        node.outputs.clear()
    edit.surgeon.cleanup()


def _fits(node: gs.Node, kind: np.dtype) -> bool:
    x, weight = node.inputs[:2]
    shape = list(x.shape or ())
    return bool(
        len(shape) == 2
        and shape[0] in ("T", "N")
        and isinstance(shape[1], int)
        and shape[1] % MULTIPLE == 0
        and shape[1] <= _MOST_WIDTH
        and node.attrs.get("axis", -1) in (-1, 1)
        and list(weight.shape or ()) == [shape[1]]
        and x.dtype == node.outputs[0].dtype == kind
        and not constant_expression(x)
        and constant_expression(weight)
        and can_evaluate(weight)
    )
