"""What ahead-of-time compilation gives, without code: the kernels' names, constants and parameters, for launches that are only recorded."""

from __future__ import annotations

import ast
from pathlib import Path

import llmlab
from llmlab.kernels.binaries import Kernel, KernelSet
from llmlab.kernels.compile import KernelSource, attention_sources
from llmlab.kernels.gpu.geometry import AttentionVariant


def parameters(function: str) -> list[str]:
    """Of a Triton function `module:name`, read from its source: importing it would decide for the whole process whether it is interpreted."""
    module, _, name = function.partition(":")
    file = Path(llmlab.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return [argument.arg for argument in found.args.args]


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


def uncompiled(variant: AttentionVariant, architecture: int = 90) -> KernelSet:
    """The kernels of `compile_attention`; each cubin is a text of its own."""
    sources = enumerate(attention_sources(variant))
    return KernelSet(kernel_of(source, architecture, f"{n} of {variant}".encode()) for n, source in sources)
