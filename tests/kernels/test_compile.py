"""Ahead-of-time compilation: what comes out fits what is launched and the GPUs that it is for. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_kernels import launched_constants, uncompiled

from llmlab.errors import EngineError, InputError
from llmlab.kernels import compile
from llmlab.kernels.binaries import Kernel, KernelSet
from llmlab.kernels.compile import attention_sources, compile_attention, compile_kernels
from llmlab.kernels.compile_worker import smaller
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant
from llmlab.kernels.source import KernelSource

if (found := importlib.util.find_spec("triton")) is None or found.origin is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)
TOOLS = Path(found.origin).parent / "backends" / "nvidia" / "bin"

SMALL = AttentionVariant(AttentionKind(4, 2, 16, 16, window=40, softcap=3.0, sinks=True), rotary=16)


@pytest.fixture(scope="module")
def compiled() -> Iterator[KernelSet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # as tests of the kernels have it; the compilers must not
        yield compile_attention([SMALL], [90])


def test_compiled_kernels_have_the_parameters_that_are_launched(compiled: KernelSet) -> None:
    def shape(kernels: KernelSet) -> set[Any]:
        return {(k.name, str(sorted(launched_constants(k))), k.parameters, k.aligned) for k in kernels.kernels}

    assert shape(compiled) == shape(uncompiled(attention_sources(SMALL)))
    assert all(kernel.cubin.startswith(b"\x7fELF") and kernel.architecture == 90 for kernel in compiled.kernels)


def source_of(variant: AttentionVariant, name: str, **constants: Any) -> KernelSource:
    found = [s for s in attention_sources(variant) if s.function.endswith(name)]
    return next(s for s in found if constants.items() <= s.constants.items())


def test_aligned_tensors_are_read_sixteen_bytes_at_a_time(compiled: KernelSet, tmp_path: Path) -> None:
    def wide_loads(kernel: Kernel) -> int:
        (tmp_path / "cubin").write_bytes(kernel.cubin)
        code = subprocess.run(
            [TOOLS / "nvdisasm", tmp_path / "cubin"], capture_output=True, text=True, check=True
        ).stdout
        return len(re.findall(r"LD(?:G|GSTS)\.E\.\S*128", code))

    source = source_of(SMALL, "paged_decode", SPLIT=False)
    (narrow,) = compile_kernels([replace(source, aligned=())], [90]).kernels
    wide = compiled.find("paged_decode", source.labels, (9, 0))
    assert wide.aligned and not narrow.aligned
    assert wide_loads(wide) > 0 == wide_loads(narrow)


def test_heads_of_odd_width_are_compiled_without_alignment() -> None:
    assert not any(s.aligned for s in attention_sources(AttentionVariant(AttentionKind(2, 2, 40, 16))))


def test_smaller_forms_have_fewer_stages_then_fewer_keys_and_keep_what_is_launched() -> None:
    forms = list(smaller({"TILE": 32, "ROWS": 64}, {"num_warps": 4, "num_stages": 2}))
    assert [(c["TILE"], o["num_stages"]) for c, o in forms] == [(32, 2), (32, 1), (16, 2), (16, 1)]
    assert all(c["ROWS"] == 64 and o["num_warps"] == 4 for c, o in forms)
    assert list(smaller({"A": 1}, {"num_warps": 1})) == [({"A": 1}, {"num_warps": 1})]


PRODUCT = """
import triton
import triton.language as tl

@triton.jit
def product(x, y, out, TILE: tl.constexpr):
    i, t = tl.arange(0, 16), tl.arange(0, TILE)
    a = tl.load(x + i[:, None] * TILE + t[None])
    b = tl.load(y + t[:, None] * 16 + i[None])
    tl.store(out + i[:, None] * 16 + i[None], tl.dot(a, b))
"""


def test_a_kernel_is_made_smaller_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "products.py").write_text(PRODUCT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    types = {"x": "*fp16", "y": "*fp16", "out": "*fp32"}
    options = {"num_warps": 4, "num_stages": 1}
    source = KernelSource("products:product", types, {"TILE": 64}, options)
    impossible = replace(source, constants={"TILE": 16})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one process does it all
    monkeypatch.setitem(compile.SHARED_LIMITS, 86, 2)
    kernels = compile_kernels([source], [86, 89])
    small, large = (kernels.find("product", {"TILE": 64}, (8, minor)) for minor in (6, 9))  # who launches need not know
    assert (small.constants, small.shared) == ({"TILE": 32}, 2 << 10)
    assert (large.constants, large.shared) == ({"TILE": 64}, 4 << 10)
    monkeypatch.setitem(compile.SHARED_LIMITS, 86, 0)
    with pytest.raises(EngineError, match=r"product for sm_86 can't be compiled: .*fits 0 KiB of shared memory"):
        compile_kernels([impossible], [86])


def test_what_no_gpu_can_do_is_refused_before_anything_is_compiled() -> None:
    fp8 = AttentionVariant(AttentionKind(2, 2, 16, 16, quantized=True), kv_dtype="float8_e4m3fn")
    with pytest.raises(InputError, match="float8_e4m3fn KV pool needs sm_89 or later, not sm_80"):
        compile_attention([fp8], [90, 80])
    with pytest.raises(InputError, match="no kernels can be compiled for sm_75: known are sm_80, sm_86"):
        compile_attention([SMALL], [75, 90])
    for dtype, kv_dtype, quantized in (
        ("float32", "float32", False),
        ("float16", "int8", False),
        ("float16",) * 2 + (True,),
    ):
        with pytest.raises(InputError, match="expected float16 or bfloat16, and a pool of"):
            AttentionVariant(AttentionKind(2, 2, 16, 16, quantized=quantized), dtype, kv_dtype)
    with pytest.raises(InputError, match="an even number of channels, not 33"):
        AttentionVariant(AttentionKind(2, 2, 33, 16, quantized=True), "float16", "int8")
    assert compile_attention([], [90]).kernels == ()


MERGE = source_of(SMALL, "merge_splits")


def test_a_compiler_that_fails_or_ends_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "ends.py").write_text("import os, sys\nprint('LLVM ERROR: no', file=sys.stderr)\nos._exit(3)")
    with pytest.raises(
        EngineError, match="kernel compiler ended while compiling f for sm_90: LLVM ERROR: no"
    ) as caught:
        compile_kernels([replace(MERGE, function="ends:f")], [90])
    assert "\n" not in str(caught.value)
    with pytest.raises(
        EngineError, match="f for sm_90 can't be compiled: ModuleNotFoundError: No module named 'nowhere'"
    ):
        compile_kernels([replace(MERGE, function="nowhere:f")], [90])


def test_an_interrupted_build_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Recorded(compile._Compiler):
        def __init__(self) -> None:
            super().__init__()
            started.append(self._process)

    def interrupt(done: int, total: int) -> None:
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(compile, "_Compiler", Recorded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(KeyboardInterrupt):
        compile_kernels([MERGE, source_of(SMALL, "locate_tokens")], [90], interrupt)
    assert len(started) == 1 and all(process.poll() is not None for process in started)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", compile.SHARED_LIMITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_gpu_gets_kernels_that_fit_it(architecture: int, head_dim: int) -> None:
    pools = {"float16": False, "int8": True, **({"float8_e4m3fn": True} if architecture >= 89 else {})}
    variants = [
        *(
            AttentionVariant(AttentionKind(8, 2, head_dim, 64, quantized=quantized), "float16", pool, head_dim)
            for pool, quantized in pools.items()
        ),
        AttentionVariant(AttentionKind(8, 2, head_dim, 64), "bfloat16", "bfloat16", head_dim),
    ]
    kernels = compile_attention(variants, [architecture])
    assert {k.architecture for k in kernels.kernels} == {architecture}
    assert max(k.shared for k in kernels.kernels) <= compile.SHARED_LIMITS[architecture] << 10
