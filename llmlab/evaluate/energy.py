"""Energy that an engine's GPU took (NVML), or the machine's processors (RAPL, /sys/class/powercap), where one may read it. Never estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from llmlab.cuda import energy as nvml

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Joules of whatever an engine runs on, since the meter was made."""

    @property
    def readable(self) -> bool:
        """Whether there is a counter to read."""

    @property
    def least_s(self) -> float:
        """How long something has to take, so that the counter's steps don't show."""

    def joules(self) -> float:
        """As a number that only grows."""


def meter_of(backend: Any) -> Meter:
    """Of the GPU that a backend runs on, or else of the processors."""
    device = getattr(backend, "device", None)
    return ProcessorMeter() if device is None else GpuMeter(device)


class GpuMeter:
    """All of one GPU, its memory too, whatever else runs on it; nothing of the host."""

    least_s = 2.0  # the counter moves some ten times a second

    def __init__(self, device: Any) -> None:
        self._counter = nvml.EnergyMeter(device)
        self._began = self._last = self._counter.joules

    @property
    def readable(self) -> bool:
        return self._last is not None

    def joules(self) -> float:
        self._last = self._counter.joules
        return 0.0 if self._last is None or self._began is None else self._last - self._began


class ProcessorMeter:
    """Joules of all processor packages since it was made; `readable` is False where there are no counters to read.

    Packages are whole: what other programs take meanwhile counts as well. Memory is in it only where the package counts it.
    """

    least_s = 0.0

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._counters: dict[Path, float] = {}
        """Largest value of each counter, behind which it begins again at 0; in microjoules."""
        for zone in sorted(folder.glob("*-rapl:*")):
            if zone.name.count(":") == 1 and _text(zone / "name").startswith("package"):  # not core, uncore, dram in it
                counter, most = zone / "energy_uj", _number(zone / "max_energy_range_uj")
                if _number(counter) is not None and most:
                    self._counters[counter] = most
        self._last = {counter: _number(counter) or 0.0 for counter in self._counters}
        self._sum = 0.0

    @property
    def readable(self) -> bool:
        return bool(self._counters)

    def joules(self) -> float:
        """Since the meter was made. A counter may have begun again once between two calls: minutes, as a rule."""
        for counter, most in self._counters.items():
            now = _number(counter)
            if now is not None:
                self._sum += (now - self._last[counter]) % most
                self._last[counter] = now
        return self._sum / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text.isdigit() else None
