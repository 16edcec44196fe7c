"""Which GPU this machine shows, for messages and checks that need no context on it."""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.cuda import driver as cuda
from llmlab.errors import EngineError, MissingDependencyError


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: tuple[int, int]
    cuda: tuple[int, int]
    """The newest CUDA that its driver runs."""


def visible_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves; None where there is none, no driver, or no cuda-bindings to ask it."""
    try:
        cuda.call("cuInit", 0)
        version = int(cuda.call("cuDriverGetVersion"))
        device = cuda.call("cuDeviceGet", 0)
        kinds = cuda.driver().CUdevice_attribute
        major = int(cuda.call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = int(cuda.call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        name = cuda.call("cuDeviceGetName", 128, device).rstrip(b"\0").decode(errors="replace")
    except (EngineError, MissingDependencyError):
        return None
    return Gpu(name, (major, minor), (version // 1000, version % 1000 // 10))
