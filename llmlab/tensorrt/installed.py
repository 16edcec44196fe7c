"""The TensorRT that is installed, or what to install."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Literal

from llmlab.errors import MissingDependencyError
from llmlab.tensorrt.gpu import visible_gpu

Kind = Literal["tensorrt", "tensorrt-rtx"]
Capability = tuple[int, int]

_OLDEST = {"tensorrt": (8, 6), "tensorrt-rtx": (1, 0)}


def find_tensorrt(kind: Kind) -> tuple[ModuleType, tuple[int, ...]]:
    """Its module and version. Raises MissingDependencyError where there is none, or one that is too old."""
    name = kind.replace("-", "_")
    if kind == "tensorrt-rtx":
        link_rtx()
    try:
        module = importlib.import_module(name)
        if module.__file__ is None:
            raise ImportError(f"{name} is a folder on the path")
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"{name} can't be imported ({' '.join(str(error).split())}): {_advice(kind)}"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:4])
    if version < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        raise MissingDependencyError(f"{name} is {module.__version__}, llmlab needs {oldest} or newer: {_advice(kind)}")
    return module, version


def link_rtx() -> None:
    """Give TensorRT-RTX's library the name under which its ONNX parser opens it; without it a plugin node ends the process."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    for folder in (spec and spec.submodule_search_locations) or ():
        versioned = sorted(Path(folder).glob("libtensorrt_rtx.so.*"))
        link = Path(folder) / "libtensorrt_rtx.so"
        if not versioned or link.exists():
            continue
        try:
            link.symlink_to(versioned[0].name)
        except FileExistsError:  # another process was faster
            continue
        except OSError as problem:
            raise MissingDependencyError(
                f"{link} must be a link to {versioned[0].name} and can't be made ({problem.strerror}): make it, or install tensorrt-rtx where you may write"
            ) from problem


def _advice(kind: Kind) -> str:
    """What to install for the GPU that is here."""
    gpu = visible_gpu()
    rtx = "pip install 'llmlab[tensorrt-rtx]' (GeForce and RTX GPUs: 7.5, 8.0 to 8.9, 12.x; builds without a GPU)"
    full = "pip install 'llmlab[tensorrt]' and a TensorRT of 8.6 or newer for your driver (data centre GPUs such as 9.0 and 10.0 need this one)"
    advice = full if kind == "tensorrt" else rtx
    if gpu is None:
        return advice
    here = f"here is a {gpu.name}, compute capability {dotted([gpu.compute_capability])}"
    major = gpu.compute_capability[0]
    if kind == "tensorrt-rtx" and major in (9, 10, 11):
        return f"{here}, which TensorRT-RTX doesn't serve: use target='tensorrt', {full}"
    return f"{here}: {advice}"


def dotted(capabilities: Iterable[Capability]) -> str:
    """As people write them: 8.0, 8.9."""
    return ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
