"""Ahead-of-time compilation: what comes out fits what is launched and the GPUs that it is for. Needs no GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'llmlab[tensorrt]'", allow_module_level=True)

from fake_kernels import uncompiled

from llmlab.kernels.binaries import KernelSet
from llmlab.kernels.compile import compile_attention
from llmlab.kernels.gpu.geometry import AttentionKind, AttentionVariant

SMALL = AttentionVariant(AttentionKind(4, 2, 16, 16, window=40, softcap=3.0, sinks=True), rotary=16)


@pytest.fixture(scope="module")
def compiled() -> KernelSet:
    return compile_attention([SMALL], [90])


def test_compiled_kernels_have_the_parameters_that_are_launched(compiled: KernelSet) -> None:
    def shape(kernels: KernelSet) -> set[Any]:
        return {(k.name, str(sorted(k.constants.items())), k.parameters, k.aligned) for k in kernels.kernels}

    assert shape(compiled) == shape(uncompiled(SMALL))
    assert all(kernel.cubin.startswith(b"\x7fELF") and kernel.architecture == 90 for kernel in compiled.kernels)
