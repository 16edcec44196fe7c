"""RMS normalization: the kernel under Triton's interpreter (or on a GPU) against NumPy, and what is launched."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
import torch
from fake_driver import FakeDriver, installed
from fake_kernels import record, uncompiled, values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llmlab.cuda import Device, DeviceBuffer, Stream  # noqa: E402 (the interpreter is chosen when triton is imported)
from llmlab.errors import EngineError, InputError  # noqa: E402
from llmlab.kernels.binaries import KernelSet  # noqa: E402
from llmlab.kernels.compile import compile_kernels, norm_source  # noqa: E402
from llmlab.kernels.gpu.launch_norm import NormKind, launch  # noqa: E402
from llmlab.kernels.gpu.norm import rms_norm  # noqa: E402
from llmlab.kernels.norms import NormPointers, RowNorm  # noqa: E402

HALF = NormKind(144, "float16", "float16", "float32", 1e-5)
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}


def expected(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * weight


def rows_of(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, the last all zero where there are several."""
    x = np.random.default_rng(seed).normal(size=(rows, width)) * np.logspace(-2, 2, rows)[:, None]
    x[-1] *= rows == 1
    return x


def normalized(kind: NormKind, x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """By the kernel, with rows `stride` elements apart and a result full of NaN before."""
    types = {name: getattr(torch, name) for name in TOLERANCE}
    given = torch.full((len(x), stride), torch.nan, dtype=types[kind.dtype], device=DEVICE)
    given[:, : kind.width] = torch.from_numpy(x).to(given)
    out = torch.full((len(x) + 1, kind.width), torch.nan, dtype=types[kind.out_dtype], device=DEVICE)
    factor = torch.from_numpy(weight).to(DEVICE, types[kind.weight_dtype])
    how = launch(kind, len(x))
    rms_norm[how.grid](out, given, factor, kind.epsilon, kind.width, stride, **how.constants, **how.options)
    assert bool(torch.isnan(out[-1]).all())  # past the end: not to be touched
    return out[:-1].double().cpu().numpy()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [16, 144, 4096])
@pytest.mark.parametrize("types", [("float16", "float16", "float32"), ("float32", "float16", "float16")])
def test_rows_are_normalized(rows: int, width: int, types: tuple[str, str, str]) -> None:
    kind = NormKind(width, *types, 1e-5)
    x, weight = rows_of(rows, width).astype(kind.dtype), np.random.default_rng(1).normal(size=width).astype(np.float16)
    found, want = normalized(kind, x, weight, width + 32), expected(x, weight, kind.epsilon)
    assert np.abs(found - want).max() <= TOLERANCE[kind.out_dtype] * np.abs(want).max()
    wrong = expected(x, weight, 1e-3)  # another epsilon shows in the small rows
    if rows > 1:
        assert np.abs(found - wrong).max() > 10 * TOLERANCE[kind.out_dtype]


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16")
def test_bfloat16() -> None:
    kind = NormKind(4096, "bfloat16", "bfloat16", "bfloat16", 1e-6)
    x = torch.from_numpy(rows_of(3, 4096)).bfloat16().double().numpy()
    weight = np.ones(4096)
    found, want = normalized(kind, x, weight, 4096), expected(x, weight, kind.epsilon)
    assert np.abs(found - want).max() <= TOLERANCE["bfloat16"] * np.abs(want).max()


@pytest.mark.parametrize(
    "changed", [{"width": 24}, {"width": 1 << 16}, {"dtype": "int8"}, {"out_dtype": "int8"}, {"epsilon": -1.0}]
)
def test_what_has_no_kernel_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InputError, match="no kernel for"):
        NormKind(**{**vars(HALF), **changed})  # type: ignore[arg-type]


def test_what_is_launched() -> None:
    with installed(FakeDriver()) as fake:
        kernels = uncompiled([norm_source(HALF)])
        record(fake, kernels)
        norm = RowNorm(kernels, Device.open(), HALF)
        pointers = NormPointers(x=0x1000, x_stride=160, weight=0x2000, out=0x3000)
        norm.enqueue(7, pointers, rows=0)
        norm.enqueue(7, pointers, rows=9)
        (found,) = fake.launches
        with pytest.raises(EngineError, match="multiples of 16"):
            norm.enqueue(7, NormPointers(x=0x1008, x_stride=160, weight=0x2000, out=0x3000), rows=9)
    assert found.grid == (9, 1, 1) and found.stream == 7
    given = values(found, kernels)
    assert given["width"] == 144 and given["x_stride"] == 160 and given["out"] == 0x3000
    assert given["epsilon"] == pytest.approx(1e-5)
    with installed(FakeDriver()), pytest.raises(EngineError, match="no kernel"):
        RowNorm(KernelSet(()), Device.open(), HALF)


def test_compiled_ahead_of_time_it_starts_early_from_sm_90_on() -> None:
    old, new = compile_kernels([norm_source(HALF)], [80, 90]).kernels
    for kernel, early in ((old, False), (new, True)):
        assert [name for name, _ in kernel.parameters] == ["out", "x", "weight", "epsilon", "width", "x_stride"]
        assert kernel.constants["EARLY"] is early
        capability = divmod(kernel.architecture, 10)
        with installed(FakeDriver(capability)) as fake:
            record(fake, KernelSet([kernel]))
            RowNorm(KernelSet([kernel]), Device.open(), HALF).enqueue(
                7, NormPointers(0x1000, 160, 0x2000, 0x3000), rows=9
            )
            (found,) = fake.launches
        assert found.early is early and found.grid == (9, 1, 1) and found.stream == 7


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_compiled_kernel_on_a_gpu() -> None:
    device = Device.open()
    major, minor = device.compute_capability
    kind = NormKind(4096, "float16", "float16", "float32", 1e-5)
    kernels = compile_kernels([norm_source(kind)], [10 * major + minor])
    x, weight = rows_of(7, 4096).astype(np.float16), np.random.default_rng(1).normal(size=4096).astype(np.float32)
    given, factor = DeviceBuffer.of(x, "x"), DeviceBuffer.of(weight, "weight")
    out = torch.full((7, 4096), torch.nan, dtype=torch.float16, device=DEVICE)
    stream = Stream()
    with stream.capture() as graph:
        RowNorm(kernels, device, kind).enqueue(
            stream, NormPointers(given.pointer, 4096, factor.pointer, out.data_ptr()), rows=7
        )
    torch.cuda.synchronize()
    graph.launch(stream)
    stream.synchronize()
    want = expected(x, weight, kind.epsilon)
    assert np.abs(out.double().cpu().numpy() - want).max() <= TOLERANCE["float16"] * np.abs(want).max()
