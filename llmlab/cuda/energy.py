"""What a GPU has used since its driver was loaded, from NVIDIA's management library."""

from __future__ import annotations

import ctypes
from typing import Any

from llmlab.cuda.device import Device

_LIBRARY = "libnvidia-ml.so.1"


class EnergyMeter:
    """The energy counter of one GPU. `joules` is None wherever it can't be read: no library, an old GPU, no permission."""

    def __init__(self, device: Device) -> None:
        self._library, self._handle = _open(device.pci_bus_id)

    @property
    def joules(self) -> float | None:
        """Since the driver was loaded, of everything on the GPU. It moves some ten times a second."""
        if self._library is None:
            return None
        millijoules = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return None if status else millijoules.value / 1e3


def _open(pci_bus_id: str) -> tuple[Any, ctypes.c_void_p]:
    """The library and its handle of the GPU; None for the library where either isn't there."""
    handle = ctypes.c_void_p()
    try:
        library = ctypes.CDLL(_LIBRARY)
        failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByPciBusId_v2(
            pci_bus_id.encode(), ctypes.byref(handle)
        )
    except (OSError, AttributeError):  # no such library, or one without these functions
        return None, handle
    return (None if failed else library), handle
