"""Whether products and norms read and write only what is there."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmlab.errors import InputError
from llmlab.runtime.backends.tensorrt.rows import norm_kind, product_kind
from llmlab.runtime.program import Multiply, Normalize, Program, TensorSpec

_MULTIPLE = 16  # elements; what the kernels ask of where rows and columns begin


def check_multiply(step: Multiply, program: Program) -> None:
    """Raises ValueError for a product that is none, or whose tensors and weights are not as large as it says."""
    x = _check_tensors(step, program, step.depth)
    if step.add is not None:
        add = program.tensors.get(step.add)
        if add is None or (add.width, add.rows, add.dtype) != (step.width, x.rows, x.dtype):
            raise ValueError(f"{step.name} adds {step.add}, which is not {step.width} columns of {x.dtype}")
    try:
        kind = product_kind(step, program)
    except InputError as problem:
        raise ValueError(f"{step.name}: {problem}") from problem
    stored = "int8" if step.weight_dtype == "int4" else step.weight_dtype
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {step.weight: (stored, kind.weight_shape)}
    if step.bias is not None:
        wanted[step.bias] = (x.dtype, (kind.outputs,))
    if (step.scale is None) != (kind.scale_shape is None):
        raise ValueError(f"{step.name} has a weight in {step.weight_dtype}, and its scale is {step.scale!r}")
    if step.scale is not None and kind.scale_shape is not None:
        wanted[step.scale] = ("float16", kind.scale_shape)
    _check_weights(step, program, wanted)


def check_normalize(step: Normalize, program: Program) -> None:
    """Raises ValueError for a norm that is none, or whose tensors and weight are not as large as it says."""
    _check_tensors(step, program, step.width)
    if type(step.epsilon) not in (int, float) or not math.isfinite(step.epsilon):
        raise ValueError(f"{step.name} has epsilon {step.epsilon!r}")
    weight = program.weights.get(step.weight)
    if weight is None or weight.shape != (step.width,):
        raise ValueError(f"{step.name} reads {step.weight} as [{step.width}], which is not among the weights")
    try:
        norm_kind(step, program)
    except InputError as problem:
        raise ValueError(f"{step.name}: {problem}") from problem


def _check_tensors(step: Multiply | Normalize, program: Program, depth: int) -> TensorSpec:
    """That `depth` columns of x and all of out are there; gives x."""
    x, out = program.tensors.get(step.x.tensor), program.tensors.get(step.out)
    if not all(type(n) is int and n >= 1 for n in (depth, step.width)):
        raise ValueError(f"{step.name} is {depth} by {step.width}")
    offset = step.x.offset
    if x is None or type(offset) is not int or not 0 <= offset <= x.width - depth:
        raise ValueError(f"{step.name} reads {depth} columns of {step.x}, which are not there")
    if offset % _MULTIPLE or x.width % _MULTIPLE:
        raise ValueError(f"{step.name} reads columns from {offset} of {x.width}, not multiples of {_MULTIPLE}")
    if out is None or out.width != step.width or out.rows != x.rows:
        raise ValueError(
            f"{step.name} writes {step.out}, which hasn't {step.width} columns for each row of {step.x.tensor}"
        )
    return x


def _check_weights(step: Multiply, program: Program, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, (dtype, shape) in wanted.items():
        found = program.weights.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(f"{step.name} reads {name} as {dtype} {list(shape)}, which is not among the weights")
