"""What ahead-of-time compilation gives, without code: the kernels' names, constants and parameters, for launches that are only recorded."""

from __future__ import annotations

import ast
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fake_driver import FakeDriver, Launch

import llmlab
from llmlab.kernels.binaries import Kernel, KernelSet
from llmlab.kernels.source import KernelSource

WORDS = {"ptr": "Q", "i64": "q", "i32": "i4x", "fp32": "f4x"}
"""How the driver reads a parameter of 8 bytes, by its type."""


def parameters(function: str) -> list[str]:
    """Of a Triton function `module:name`, read from its source: importing it would decide for the whole process whether it is interpreted."""
    module, _, name = function.partition(":")
    file = Path(llmlab.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return [argument.arg for argument in found.args.args if argument.arg != "EARLY"]  # the compiler's


def kernel_of(source: KernelSource, architecture: int, cubin: bytes) -> Kernel:
    """What compiling `source` gives, but for its code."""
    names = [p for p in parameters(source.function) if p not in source.constants and p not in source.null]
    return Kernel(
        name=source.function.partition(":")[2],
        constants=source.labels or source.constants,
        architecture=architecture,
        parameters=tuple((p, "ptr" if source.types[p].startswith("*") else source.types[p]) for p in names),
        num_warps=source.options["num_warps"],
        shared=100_000 if "TILE" in source.constants else 0,
        aligned=bool(source.aligned),
        cubin=cubin,
    )


def launched_constants(kernel: Kernel) -> list[tuple[str, Any]]:
    """Without what the compiler adds for an architecture."""
    return [(name, value) for name, value in kernel.constants.items() if name != "EARLY"]


def uncompiled(sources: Iterable[KernelSource], architecture: int = 90) -> KernelSet:
    """What `compile_kernels` gives; each cubin is a text of its own."""
    return KernelSet(kernel_of(source, architecture, str(source).encode()) for source in sources)


def record(fake: FakeDriver, kernels: KernelSet) -> None:
    """Let `fake` know how many parameters each of these kernels has."""
    fake.parameters = {kernel.cubin: len(kernel.parameters) + 2 for kernel in kernels.kernels}


def values(launch: Launch, kernels: KernelSet) -> dict[str, Any]:
    """What the kernel reads from its parameters; the two that Triton adds must be null."""
    (names,) = {kernel.parameters for kernel in kernels.kernels if kernel.cubin == launch.cubin}
    *given, first, second = launch.words
    assert first == second == bytes(8)
    pairs = zip(names, given, strict=True)
    return {name: struct.unpack("<" + WORDS[kind], word)[0] for (name, kind), word in pairs}
