"""Whether a program can be believed: everything that it reads or writes is where it says, and as large."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmlab.files import plain_name
from llmlab.kernels.gpu.geometry import QUANTIZED_POOLS
from llmlab.runtime.backends.tensorrt.bindings import POOL, UPDATED
from llmlab.runtime.backends.tensorrt.check_rows import check_multiply, check_normalize
from llmlab.runtime.backends.tensorrt.memory import ITEM_BYTES, lifetimes
from llmlab.runtime.manifest import Manifest
from llmlab.runtime.program import Attend, Multiply, Normalize, Program, RunPlan, TensorSpec, View

_STEP = ("input_ids", "position_ids", "query_start", "kv_len", "block_table", "logits_index", "slots")
_SCALES = {"k_scale", "v_scale"}
_MOST = 1 << 24  # columns


def check_program(program: Program, manifest: Manifest) -> None:
    """Raises ValueError or EngineError, in one line, for the first thing that is wrong."""
    for name, spec in program.tensors.items():
        whole = type(spec.width) is int and 0 <= spec.width <= _MOST
        if not whole or spec.dtype not in ITEM_BYTES or spec.rows not in ("T", "N"):
            raise ValueError(f"{name} is {spec}, which is no tensor")
    if program.tensors.get("logits", TensorSpec("", 0)).dtype != "float32":
        raise ValueError("logits are not float32")
    for name, weight in program.weights.items():
        whole = all(type(n) is int and 1 <= n <= _MOST for n in weight.shape)
        if not whole or weight.dtype not in ITEM_BYTES or name in program.tensors:
            raise ValueError(f"{name} is {weight}, which is no weight")
    pools = {f"{POOL}{i}" for i in range(len(manifest.kv.layers))}
    known = {*program.tensors, *_STEP, *pools, *(f"{pool}{UPDATED}" for pool in pools)}
    for step in program.steps:
        if isinstance(step, Attend):
            _check_attend(step, program, manifest)
            continue
        if isinstance(step, Multiply):
            check_multiply(step, program)
            continue
        if isinstance(step, Normalize):
            check_normalize(step, program)
            continue
        _check_plan(step, manifest)
        for name in (*step.inputs.values(), *step.outputs.values()):
            if name not in known and not (name in program.weights and name not in step.outputs.values()):
                raise ValueError(f"{step.name or step.plan} binds {name}, which is not there")
    lifetimes(program)


def check_tables(program: Program, tables: Mapping[str, NDArray[np.float32]], max_seq_len: int) -> None:
    """Raises ValueError for the first table that attention would read past its end."""
    for step in (s for s in program.steps if isinstance(s, Attend)):
        shapes = {what: tables[name].shape if name in tables else () for what, name in step.tables.items()}
        for what, shape in shapes.items():
            if what in ("cos", "sin"):
                fits = len(shape) == 2 and shape[0] >= max_seq_len and 1 <= 2 * shape[1] <= step.head_dim
            elif what in _SCALES:
                fits = shape == (step.kv_heads,) and bool((tables[step.tables[what]] > 0).all())
            else:
                fits = shape == (step.num_heads,)
            if not fits:
                raise ValueError(
                    f"{step.name} reads {what} from {step.tables[what]!r}, which is {shape or 'not there'}"
                )
        if shapes.get("cos") != shapes.get("sin"):
            raise ValueError(f"{step.name} has RoPE tables of different shapes")


def _check_plan(step: RunPlan, manifest: Manifest) -> None:
    if not plain_name(step.plan) or step.plan not in manifest.files:
        raise ValueError(f"{step.plan!r} is no file of the engine")


def _check_attend(step: Attend, program: Program, manifest: Manifest) -> None:
    sizes = (step.num_heads, step.kv_heads, step.head_dim)
    if not all(type(n) is int and n >= 1 for n in sizes) or step.num_heads % step.kv_heads:
        raise ValueError(f"{step.name} has heads {sizes}")
    if type(step.layer) is not int or not 0 <= step.layer < len(manifest.kv.layers):
        raise ValueError(f"{step.name} uses KV pool {step.layer!r} of {len(manifest.kv.layers)}")
    if manifest.kv.layers[step.layer] != (step.kv_heads, step.head_dim):
        raise ValueError(f"{step.name} has other heads than KV pool {step.layer}")
    numbers = (step.scale, step.window, step.softcap)
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers) or type(step.window) is not int:
        raise ValueError(f"{step.name} has scale, window and softcap {numbers}")
    given = set(step.tables)
    whole = (given & _SCALES == _SCALES) == (manifest.kv.dtype in QUANTIZED_POOLS) and len(given & _SCALES) != 1
    if not given <= {"cos", "sin", "alibi_slopes", "sinks", *_SCALES} or not whole or len(given & {"cos", "sin"}) == 1:
        raise ValueError(f"{step.name} has tables {', '.join(sorted(step.tables))}")
    out = program.tensors.get(step.out)
    if out is None or out.width != step.num_heads * step.head_dim or out.rows != "T":
        raise ValueError(f"{step.name} writes {step.out}, which hasn't {step.num_heads} heads of {step.head_dim}")
    for view, heads in ((step.q, step.num_heads), (step.k, step.kv_heads), (step.v, step.kv_heads)):
        _check_view(step, view, heads * step.head_dim, program.tensors.get(view.tensor), out)


def _check_view(step: Attend, view: View, width: int, spec: TensorSpec | None, out: TensorSpec) -> None:
    inside = spec is not None and type(view.offset) is int and 0 <= view.offset <= spec.width - width
    if spec is None or not inside or spec.rows != "T" or spec.dtype != out.dtype:
        raise ValueError(f"{step.name} reads {width} columns of {view}, which are not there in {out.dtype}")
