"""A small plain ONNX file, as something else might have written it, to be spoiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from small_graphs import weights

CONFIG = {
    "model_type": "toy",
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
# One layer: attention over a mask that is computed, beside a softmax gate that has no part in it.
TEXT = """model (int64[rows,columns] input_ids, int64[rows,columns] position_ids) => (float[rows,columns,12] logits) {
    x = Gather(embed, input_ids)
    gate = Softmax<axis=-1>(x)
    q0 = MatMul(x, wq)
    k0 = MatMul(x, wk)
    v0 = MatMul(x, wv)
    two = Constant<value_ints=[0, 0, 2, 4]>()
    one = Constant<value_ints=[0, 0, 1, 4]>()
    flat = Constant<value_ints=[0, 0, 8]>()
    q1 = Reshape(q0, two)
    k1 = Reshape(k0, one)
    v1 = Reshape(v0, one)
    q = Transpose<perm=[0,2,1,3]>(q1)
    k = Transpose<perm=[0,2,1,3]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)
    shape = Shape(input_ids)
    at1 = Constant<value_int=1>()
    length = Gather(shape, at1)
    start = Constant<value_int=0>()
    row = Range(start, length, at1)
    first = Constant<value_ints=[1]>()
    column = Unsqueeze(row, first)
    seen = LessOrEqual(row, column)
    shown = Constant<value_float=0.0>()
    hidden = Constant<value_float=-100000.0>()
    mask2 = Where(seen, shown, hidden)
    front = Constant<value_ints=[0, 1]>()
    mask = Unsqueeze(mask2, front)
    a = Attention(q, k, v, mask)
    a1 = Transpose<perm=[0,2,1,3]>(a)
    a2 = Reshape(a1, flat)
    a3 = MatMul(a2, wo)
    y0 = Add(x, a3)
    y = Mul(y0, gate)
    logits = MatMul(y, head)
}"""


def plain_model() -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 23]>' + TEXT)
    given = weights(embed=(12, 8), wq=(8, 8), wk=(8, 4), wv=(8, 4), wo=(8, 8), head=(8, 12))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in given.items())
    for node in model.graph.node:
        node.name = f"model.layers.0/{node.output[0]}"
    return model


def write(folder: Path, change: Callable[[onnx.ModelProto], Any] = lambda model: None) -> Path:
    """The plain model, changed, as a file in `folder`. A change that gives bytes gives the whole file."""
    model = plain_model()
    made = change(model)
    path = folder / "model.onnx"
    path.write_bytes(made if isinstance(made, bytes) else model.SerializeToString())
    return path


def of_opset_18(model: onnx.ModelProto) -> None:
    """Attention in primitives, as exporters wrote it before there was an operator."""
    model.opset_import[0].version = 18
    (old,) = (n for n in model.graph.node if n.op_type == "Attention")
    at = list(model.graph.node).index(old)
    model.graph.node.remove(old)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "scale"))
    make = onnx.helper.make_node
    primitives = [
        make("Transpose", ["k"], ["kt"], "model.layers.0/kt", perm=[0, 1, 3, 2]),
        make("MatMul", ["q", "kt"], ["scores0"], "model.layers.0/scores0"),
        make("Mul", ["scores0", "scale"], ["scores1"], "model.layers.0/scores1"),
        make("Add", ["scores1", "mask"], ["scores"], "model.layers.0/scores"),
        make("Softmax", ["scores"], ["p"], "model.layers.0/p", axis=-1),
        make("MatMul", ["p", "v"], ["a"], "model.layers.0/a"),
    ]
    for i, node in enumerate(primitives):
        model.graph.node.insert(at + i, node)
