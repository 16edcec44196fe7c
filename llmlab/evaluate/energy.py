"""Energy that the machine's processors took, where Linux lets one read it (RAPL, /sys/class/powercap). Never estimated."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules of all processor packages since it was made; `readable` is False where there are no counters to read.

    Packages are whole: what other programs take meanwhile counts as well. Memory is in it only where the package counts it.
    """

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
