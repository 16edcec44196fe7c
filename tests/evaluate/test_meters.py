"""Energy per token, of a GPU by its counter, of processors by theirs, and of nothing where none can be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_nvml import FakeNvml, counted_gpu

from llmlab import speed
from llmlab.evaluate import costs_process
from llmlab.evaluate.energy import GpuMeter, ProcessorMeter, meter_of


def counters(folder: Path, **values: str) -> None:
    for name, text in values.items():
        zone = folder / name.replace("_", ":")
        zone.mkdir(parents=True, exist_ok=True)
        label, _, count = text.partition("=")
        (zone / "name").write_text(f"{label}\n")
        (zone / "energy_uj").write_text(f"{count}\n")
        (zone / "max_energy_range_uj").write_text("1000000\n")


def test_energy_of_all_packages_and_nothing_twice(tmp_path: Path) -> None:
    def rapl(**values: str) -> None:
        for name, text in values.items():
            counters(tmp_path, **{f"intel-rapl_{name}": text})

    rapl(**{"0": "package-0=900000", "1": "package-1=100", "0_0": "core=5", "2": "psys=7"})
    meter = ProcessorMeter(tmp_path)
    assert meter.readable and meter.joules() == 0
    rapl(**{"0": "package-0=100000", "1": "package-1=300100", "0_0": "core=999999"})
    assert meter.joules() == pytest.approx(0.2 + 0.3), "one counter began again at 0"
    assert meter.joules() == pytest.approx(0.5)


def test_no_counters_no_energy(tmp_path: Path) -> None:
    assert not ProcessorMeter(tmp_path / "nothing").readable
    counters(tmp_path, **{"intel-rapl_0": "package-0=x"})
    assert not ProcessorMeter(tmp_path).readable, "there, and not to be read"


def test_each_engine_has_the_meter_of_what_it_runs_on() -> None:
    assert isinstance(meter_of(SimpleNamespace()), ProcessorMeter)
    with counted_gpu(FakeNvml(step=2500)) as device:
        meter = meter_of(SimpleNamespace(device=device))
        assert isinstance(meter, GpuMeter) and meter.readable
        assert (meter.joules(), meter.joules()) == (2.5, 5.0)


def driven(library: Any, monkeypatch: pytest.MonkeyPatch, least_s: float = 0.0) -> tuple[float | None, int]:
    """Joules a token of runs that take no time, and how many there were."""
    runs: list[tuple[int, int, int]] = []

    def drive(core: Any, batch: int, prompt: int, output: int, random: np.random.Generator) -> None:
        runs.append((batch, prompt, output))

    monkeypatch.setattr(speed, "drive", drive)
    monkeypatch.setattr(GpuMeter, "least_s", least_s)
    with counted_gpu(library) as device:
        found = costs_process._joules(SimpleNamespace(core=None), meter_of(SimpleNamespace(device=device)), 4, 16, 8)
    assert set(runs) <= {(4, 16, 8)}
    return found, len(runs)


def test_joules_of_a_token_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driven(FakeNvml(step=64_000), monkeypatch) == (2.0, 1)
    joules, runs = driven(FakeNvml(step=64_000), monkeypatch, least_s=0.02)
    assert runs > 1 and joules == pytest.approx(2.0 / runs), "long enough for the counter's steps"


def test_a_counter_that_fails_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driven(FakeNvml("energy"), monkeypatch) == (None, 0)
    library = FakeNvml(step=1000)
    later = library.nvmlDeviceGetTotalEnergyConsumption

    def fails_the_third_time(handle: Any, value: Any) -> int:
        later(handle, value)
        return library.count > 1_236_500

    monkeypatch.setattr(library, "nvmlDeviceGetTotalEnergyConsumption", fails_the_third_time)
    assert driven(library, monkeypatch) == (None, 1)
