"""What a number was measured on, and how much of the machine others took meanwhile."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("llmlab", "onnxruntime", "torch", "transformers", "numpy")


def describe(also: dict[str, str] | None = None) -> dict[str, object]:
    """Processor, cores, memory, Python and package versions (with those of `also`), date. Not whose machine it is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "logical_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | (also or {}),
    }


def summary(machine: dict[str, object]) -> str:
    """The description in two lines."""
    packages = machine["packages"]
    assert isinstance(packages, dict)
    versions = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    size = f"{machine['logical_cpus']} CPUs, {machine['memory_gib']} GiB"
    return f"{machine['cpu']}, {size}, Python {machine['python']}, {machine['date']}\n{versions}"


class Meter:
    """Share of all CPUs' time that other processes (and the hypervisor) took between start and stop."""

    def __init__(self) -> None:
        self._began = (time.perf_counter(), _busy_seconds())

    def foreign_share(self, own_cpu_s: float) -> float | None:
        """`own_cpu_s`: CPU time that the measured process used since this meter was made. None if unknown."""
        began, busy = self._began
        now = _busy_seconds()
        if busy is None or now is None:
            return None
        capacity = (time.perf_counter() - began) * (os.cpu_count() or 1)
        return max(0.0, (now - busy - own_cpu_s) / capacity)


def _busy_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
