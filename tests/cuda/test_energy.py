"""Energy is read where there is a counter, and nowhere invented."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import FakeNvml, counted_gpu

from llmlab.cuda.energy import EnergyMeter


def test_joules_of_the_gpu_that_runs() -> None:
    library = FakeNvml()
    with counted_gpu(library) as device:
        assert EnergyMeter(device).joules == 1234.5
    assert library.asked == b"0000:65:00.0"


@pytest.mark.parametrize("library", [None, SimpleNamespace(), *map(FakeNvml, ("init", "handle", "energy"))])
def test_nothing_where_it_cannot_be_read(library: Any) -> None:
    with counted_gpu(library) as device:
        assert EnergyMeter(device).joules is None
