"""Energy is read where there is a counter, and nowhere invented."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_driver import FakeDriver, installed

from llmlab.cuda import Device
from llmlab.cuda.energy import EnergyMeter


class FakeLibrary:
    """Counts in millijoules; `refuse`: the function that fails."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.asked = refuse, b""

    def nvmlInit_v2(self) -> int:
        return self.refuse == "init"

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:
        self.asked = bus
        return self.refuse == "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        energy._obj.value = 1_234_500
        return self.refuse == "energy"


def meter(monkeypatch: pytest.MonkeyPatch, library: Any) -> EnergyMeter:
    def load(name: str) -> Any:
        assert name == "libnvidia-ml.so.1"
        if library is None:
            raise OSError("cannot open shared object file")
        return library

    monkeypatch.setattr("llmlab.cuda.energy.ctypes.CDLL", load)
    fake = FakeDriver()
    fake.answers["cuDeviceGetPCIBusId"] = b"0000:65:00.0\0\0\0"
    with installed(fake):
        return EnergyMeter(Device.open())


def test_joules_of_the_gpu_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    assert meter(monkeypatch, library).joules == 1234.5
    assert library.asked == b"0000:65:00.0"


@pytest.mark.parametrize("library", [None, SimpleNamespace(), *map(FakeLibrary, ("init", "handle", "energy"))])
def test_nothing_where_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    assert meter(monkeypatch, library).joules is None
