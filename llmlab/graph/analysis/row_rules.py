"""By operator: the rule that says when each row (token) of the output depends on the same row of the inputs alone."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from llmlab.graph.analysis import row_math, row_moves
from llmlab.graph.analysis.operator_kinds import ELEMENTWISE, REDUCTIONS
from llmlab.graph.analysis.row_facts import NUMBERED, Rows, Rule, broadcast, kept
from llmlab.graph.edit import constant_expression

_RULES: dict[str, Rule] = {
    "ArgMax": row_math.arg_reduction,
    "ArgMin": row_math.arg_reduction,
    "CastLike": lambda rows: kept(rows, rows.first),
    "Concat": row_moves.concat,
    "CumProd": row_math.cumulative,
    "CumSum": row_math.cumulative,
    "DequantizeLinear": row_math.quantization,
    "Einsum": row_math.einsum,
    "Expand": row_moves.expand,
    "Flatten": row_moves.reshape,
    "Gather": row_moves.gather,
    "GatherElements": row_moves.aligned,
    "GatherND": row_moves.gather_nd,
    "GatedActivation": row_math.along(-1),
    "MixtureOfExperts": row_math.experts,
    "Gemm": row_math.gemm,
    "Hardmax": row_math.along(-1),
    "LayerNormalization": row_math.norm,
    "LogSoftmax": row_math.along(-1),
    "LpNormalization": row_math.along(-1),
    "MatMul": row_math.matmul,
    "OneHot": row_math.one_hot,
    "Pad": row_moves.pad,
    "QuantizeLinear": row_math.quantization,
    "RMSNormalization": row_math.norm,
    "Reshape": row_moves.reshape,
    "RotaryEmbedding": row_math.rotary,
    "ScatterElements": row_moves.aligned,
    "Slice": row_moves.slice_,
    "Softmax": row_math.along(-1),
    "Split": row_math.along(0),
    "Squeeze": row_moves.squeeze,
    "Tile": row_moves.tile,
    "TopK": row_math.along(-1),
    "Transpose": row_moves.transpose,
    "Trilu": row_math.trilu,
    "Unsqueeze": row_moves.unsqueeze,
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, broadcast),
    **dict.fromkeys(REDUCTIONS, row_math.reduction),
    **_RULES,
}
"""By operator, in ONNX's own domain and ONNX Runtime's."""

SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,)}
"""Inputs that only say how large the output is: they may depend on the number of tokens."""


def constant_rows(node: gs.Node, out: int) -> str | None:
    """For a node whose output counts tokens though no input does: whether all its rows are the same."""
    if node.op == "ConstantOfShape":
        return None
    if node.op == "Expand":
        return broadcast(Rows(node, (None,) * len(node.inputs), out), (0,))
    return NUMBERED if not all(constant_expression(t) for t in node.inputs) else None
