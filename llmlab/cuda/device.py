"""One GPU and its primary context, which TensorRT and torch share."""

from __future__ import annotations

from typing import Any

from llmlab.cuda.driver import call, driver
from llmlab.cuda.module import Module
from llmlab.errors import EngineError


class Device:
    """A GPU whose context is current in the thread that opened it. Another thread calls `use` first.

    The context stays until the process ends, so that whatever is freed late is freed in a context that is there.
    """

    def __init__(self, number: int, handle: Any, context: Any) -> None:
        self.number = number
        self._handle = handle
        self._context = context
        self._modules: dict[bytes, Module] = {}
        self.name: str = call("cuDeviceGetName", 128, handle).rstrip(b"\0").decode(errors="replace")
        self.compute_capability = (
            self._attribute("COMPUTE_CAPABILITY_MAJOR"),
            self._attribute("COMPUTE_CAPABILITY_MINOR"),
        )
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")

    @classmethod
    def open(cls, number: int = 0) -> Device:
        """GPU `number` of those that CUDA_VISIBLE_DEVICES leaves. EngineError where there is no driver or no such GPU."""
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
        if not 0 <= number < count:
            raise EngineError(f"GPU {number} is not there: this machine shows {count} (CUDA_VISIBLE_DEVICES chooses)")
        handle = call("cuDeviceGet", number)
        context = call("cuDevicePrimaryCtxRetain", handle)
        try:
            call("cuCtxSetCurrent", context)
            return cls(number, handle, context)
        except BaseException:
            driver().cuDevicePrimaryCtxRelease(handle)
            raise

    def use(self) -> None:
        """Make the context current in the calling thread."""
        call("cuCtxSetCurrent", self._context)

    @property
    def pci_bus_id(self) -> str:
        """Such as 0000:65:00.0, which is what other tools know this GPU by."""
        return str(call("cuDeviceGetPCIBusId", 32, self._handle).split(b"\0")[0].decode())

    @property
    def free_memory(self) -> int:
        """Bytes that nobody uses now."""
        return int(call("cuMemGetInfo")[0])

    @property
    def total_memory(self) -> int:
        return int(call("cuMemGetInfo")[1])

    def module(self, cubin: bytes) -> Module:
        """The compiled kernels in `cubin`, loaded once however many layers ask."""
        if cubin not in self._modules:
            self._modules[cubin] = Module(cubin)
        return self._modules[cubin]

    def _attribute(self, name: str) -> int:
        which = getattr(driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call("cuDeviceGetAttribute", which, self._handle))
