"""Which GPU this machine shows, for messages and checks that need no context on it."""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.cuda.driver import call, driver
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
        call("cuInit", 0)
        version = int(call("cuDriverGetVersion"))
        device = call("cuDeviceGet", 0)
        kinds = driver().CUdevice_attribute
        major = int(call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = int(call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        name = call("cuDeviceGetName", 128, device).rstrip(b"\0").decode(errors="replace")
    except (EngineError, MissingDependencyError):
        return None
    return Gpu(name, (major, minor), (version // 1000, version % 1000 // 10))
