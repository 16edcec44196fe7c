"""A declared operator's implementations held against each other on examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import helper

from llmlab.errors import InputError
from llmlab.graph.graph import OPSET
from llmlab.graph.operators.declaration import Declaration

_TOLERANCE, _NARROW_TOLERANCE = 1e-4, 1e-2  # relative to the largest value; float32 and wider, float16


def check(op: Declaration, examples: Sequence[Any], attributes: dict[str, Any]) -> float:
    """See `Operator.check`."""
    if not examples:
        raise InputError(f"{op.name}: nothing to check; pass an array, or a tuple of them, for each example")
    worst = 0.0
    for number, example in enumerate(examples):
        arrays = [np.asarray(a) for a in (example if isinstance(example, tuple) else (example,))]
        where = f"{op.name}, example {number + 1}"
        expected = [np.asarray(r) for r in op.as_list(op.reference(*arrays, **attributes))]
        shapes = op.shapes(*(a.shape for a in arrays), **attributes)
        found = run_body(op, arrays, attributes)
        for i, (body, reference, shape) in enumerate(zip(found, expected, shapes, strict=True)):
            what = where if op.num_outputs == 1 else f"{where}, output {i + 1}"
            if list(reference.shape) != shape:
                raise InputError(f"{what}: the reference gives shape {list(reference.shape)}, shape() says {shape}")
            if body.shape != reference.shape or body.dtype != reference.dtype:
                raise InputError(
                    f"{what}: the body gives {body.dtype}{list(body.shape)}, the reference {reference.dtype}{list(reference.shape)}"
                )
            error = difference(body, reference)
            tolerance = _TOLERANCE if body.dtype.itemsize >= 4 else _NARROW_TOLERANCE
            if not error <= tolerance:
                raise InputError(
                    f"{what}: body and reference differ by {error:.1e} of the largest value, more than {tolerance:.0e}"
                )
            worst = max(worst, error)
    return worst


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest finite value expected; infinite where one isn't finite and the
    other is."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(np.abs(b[finite]).max(), np.finfo(np.float32).tiny))


def run_body(op: Declaration, arrays: Sequence[np.ndarray], attributes: dict[str, Any]) -> list[np.ndarray]:
    """The ONNX body in ONNX Runtime, its optimisations off. Raises InputError where it doesn't run."""
    dtypes = op.dtypes(*(a.dtype for a in arrays), **attributes)
    given = {n: list(v) if isinstance(v, tuple) else v for n, v in attributes.items()}
    outputs = [f"output_{i}" for i in range(op.num_outputs)]
    node = helper.make_node(op.op, list(op.inputs), outputs, domain=op.domain, **given)
    kind = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [node],
        op.op,
        [helper.make_tensor_value_info(n, kind(a.dtype), a.shape) for n, a in zip(op.inputs, arrays, strict=True)],
        [helper.make_tensor_value_info(n, kind(d), None) for n, d in zip(outputs, dtypes, strict=True)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(op.domain, 1)]
    model = helper.make_model(graph, functions=[op.function], opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(r) for r in session.run(None, dict(zip(op.inputs, arrays, strict=True)))]
    except Exception as problem:  # ONNX Runtime raises types of its own, one a status
        raise InputError(f"{op.name}: its body does not run: {' '.join(str(problem).split())}") from problem
