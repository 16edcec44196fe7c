"""A stand-in for NVIDIA's management library, and a GPU whose energy it counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_driver import FakeDriver, installed

from llmlab.cuda import Device


class FakeNvml:
    """Counts in millijoules, `step` more at every reading; `refuse`: the function that fails."""

    def __init__(self, refuse: str = "", step: int = 0) -> None:
        self.refuse, self.step, self.asked = refuse, step, b""
        self.count = 1_234_500

    def nvmlInit_v2(self) -> int:
        return self.refuse == "init"

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:
        self.asked = bus
        return self.refuse == "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        energy._obj.value = self.count
        self.count += self.step
        return self.refuse == "energy"


@contextmanager
def counted_gpu(library: Any) -> Iterator[Device]:
    """library: what libnvidia-ml is; None: it isn't there."""

    def load(name: str) -> Any:
        assert name == "libnvidia-ml.so.1"
        if library is None:
            raise OSError("cannot open shared object file")
        return library

    fake = FakeDriver()
    fake.answers["cuDeviceGetPCIBusId"] = b"0000:65:00.0\0\0\0"
    with pytest.MonkeyPatch.context() as patch, installed(fake):
        patch.setattr("llmlab.cuda.energy.ctypes.CDLL", load)
        yield Device.open()
