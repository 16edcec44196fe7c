"""Calls of the CUDA driver, and what its refusals mean in one line."""

from __future__ import annotations

from functools import cache
from typing import Any, SupportsInt

from llmlab.errors import EngineError, GpuLostError, require

_LOST = {
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    "CUDA_ERROR_MPS_RPC_FAILURE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
}
"""After one of these every further call in this process fails: the context is gone."""

_OTHER_DRIVER = "update the NVIDIA driver (engines are run through cuda-bindings 13: driver 580 or later)"
_ELSEWHERE = "run this engine on a machine with an NVIDIA GPU, or build it with target='onnxruntime'"
_REASONS = {
    "CUDA_ERROR_NO_DEVICE": f"no NVIDIA GPU is visible (nvidia-smi, CUDA_VISIBLE_DEVICES): {_ELSEWHERE}",
    "CUDA_ERROR_STUB_LIBRARY": f"libcuda.so.1 is the CUDA toolkit's stub, not a driver: {_ELSEWHERE}",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the NVIDIA kernel module and libcuda.so.1 are of different versions: restart the machine",
    "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER": f"the NVIDIA driver is too old: {_OTHER_DRIVER}",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "a kernel is not for this GPU: build the engine for its compute capability",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": f"the NVIDIA driver is too old for a kernel: {_OTHER_DRIVER}",
    "CUDA_ERROR_INVALID_IMAGE": "a kernel's file is damaged, or newer than the NVIDIA driver: build the engine again, or update the driver",
}


@cache
def driver() -> Any:
    """The bindings of libcuda; tests put a recording stand-in here."""
    return require("cuda.bindings.driver", "tensorrt")


def call(function: str, *arguments: Any, asked: str = "") -> Any:
    """The results of one driver function: None, one value or a list. EngineError or GpuLostError in one line for any other status.

    `asked` says what memory the call wants, for the message if there is none left.
    """
    try:
        status, *values = getattr(driver(), function)(*arguments)
    except (
        RuntimeError,
        AttributeError,
    ) as problem:  # libcuda is opened by the first call, functions are found by name
        raise EngineError(_missing(function, problem)) from problem
    if status:
        raise _error(function, status.name, asked)
    return values[0] if len(values) == 1 else values or None


class Owned:
    """Something that the driver made, given back once: by `free`, or when nobody refers to it any more."""

    handle = 0

    def __init__(self, handle: SupportsInt, give_back: str) -> None:
        self._give_back = getattr(driver(), give_back)
        self.handle = int(handle)

    def __int__(self) -> int:
        return self.handle

    def free(self) -> None:
        """Give it back; does nothing the second time."""
        handle, self.handle = self.handle, 0
        if handle:
            self._give_back(handle)  # a status here would only repeat an earlier failure

    def __del__(self) -> None:
        self.free()


def _missing(function: str, problem: Exception) -> str:
    if "libcuda" in str(problem):
        return f"no NVIDIA driver on this machine ({problem}): {_ELSEWHERE}"
    return f"the NVIDIA driver has no {function}: {_OTHER_DRIVER}"


def _error(function: str, status: str, asked: str) -> EngineError:
    if status in _LOST:
        return GpuLostError(
            f"the GPU failed ({status} in {function}) and nothing more runs on it in this process: open the engine again in a new one"
        )
    if status == "CUDA_ERROR_OUT_OF_MEMORY":
        return EngineError(_out_of_memory(function, asked))
    return EngineError(f"{function}: {_REASONS[status]}" if status in _REASONS else f"{function} failed with {status}")


def _out_of_memory(function: str, asked: str) -> str:
    status, *memory = driver().cuMemGetInfo()
    state = "" if status else f" and {gigabytes(memory[0])} of {gigabytes(memory[1])} are free"
    return (
        f"out of GPU memory: {asked or f'more for {function}'} was asked{state}: lower the KV pool, max_batch or "
        "max_tokens_per_step, or stop what else runs on this GPU"
    )


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
