"""Observers against NumPy on all rows at once."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.quant.activations import rounded, static_scale
from llmlab.quant.observers import Rows, StatisticsOf
from llmlab.quant.statistics import Statistics

EVERYTHING = frozenset({"absmax", "meanabs", "sample", "gram"})


def test_parts_give_what_all_rows_give() -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 24)).astype(np.float32)
    observer = StatisticsOf(EVERYTHING | {"blocks/8", "blocks/24"}, rows=50)
    for part in np.split(rows, [1, 1, 400, 999]):
        observer.add(part)
    found = observer.statistics()
    assert found.count == 1000 and found.sample is not None and found.sample.shape == (50, 24)
    np.testing.assert_array_equal(found.absmax, np.abs(rows).max(0))
    np.testing.assert_allclose(found.meanabs, np.abs(rows).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.gram, rows.T @ rows / 1000, atol=1e-5)
    for group in (8, 24):
        for place, block in enumerate(found.blocks[group]):
            part = slice(place * group, (place + 1) * group)
            np.testing.assert_allclose(block, (rows.T @ rows / 1000)[part, part], atol=1e-5)
    assert {row.tobytes() for row in found.sample} <= {row.tobytes() for row in rows}


def test_rows_are_chosen_by_seed_whatever_the_parts_and_evenly() -> None:
    rows = np.arange(2000, dtype=np.float32)[:, None]
    chosen = []
    for seed, parts in ((0, 1), (0, 37), (1, 1)):
        observer = Rows(100, seed)
        for part in np.array_split(rows, parts):
            observer.add(part)
        assert observer.sample is not None
        chosen.append(observer.sample[:, 0])
    assert np.array_equal(chosen[0], chosen[1]) and not np.array_equal(chosen[0], chosen[2])
    assert (np.diff(chosen[0]) > 0).all() and 900 < chosen[0].mean() < 1100
    few = Rows(100)
    few.add(rows[:3])
    assert few.sample is not None and len(few.sample) == 3


def test_statistics_of_a_divided_tensor() -> None:
    rows = np.random.default_rng(1).standard_normal((300, 16)).astype(np.float32)
    factor = np.geomspace(0.1, 10, 16).astype(np.float32)
    whole, divided = StatisticsOf(EVERYTHING | {"blocks/8"}), StatisticsOf(EVERYTHING | {"blocks/8"})
    whole.add(rows)
    divided.add(rows / factor)
    found, expected = whole.statistics().scaled(factor), divided.statistics()
    for name in EVERYTHING:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.blocks[8], expected.blocks[8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_static_scale_cuts_off_what_costs_less_than_it_gives(dtype: str) -> None:
    rows = np.random.default_rng(2).standard_normal((512, 64)).astype(np.float32)
    rows[3, 5] = 400
    seen = Statistics(512, absmax=np.abs(rows).max(0), sample=rows)
    largest = 127 if dtype == "int8" else 448
    errors = {}
    for method in ("absmax", "percentile", "mse"):
        scale = static_scale(seen, dtype, method)
        errors[method] = float(np.square(rounded(rows, scale, dtype) - rows).sum())
        if method == "absmax":
            assert np.isclose(scale, 400 / largest)
    assert errors["mse"] <= min(errors.values()) * 1.0001
    if dtype == "int8":  # fp8's steps are relative: an outlier costs it nothing
        tail = Statistics(512, absmax=np.abs(rows).max(0), sample=np.delete(rows, 3, 0))
        assert static_scale(tail, dtype, "mse") < 0.1 * static_scale(tail, dtype, "absmax")


def test_a_tensor_of_zeros_has_a_scale() -> None:
    seen = Statistics(4, absmax=np.zeros(8, np.float32), sample=np.zeros((4, 8), np.float32))
    assert [static_scale(seen, "int8", m) for m in ("absmax", "percentile", "mse")] == [1, 1, 1]
    for wrong in ({"dtype": "int4"}, {"method": "best"}, {"percentile": 0.0}):
        with pytest.raises(ValueError, match=r"available|expected more than 0"):
            static_scale(seen, **{"dtype": "int8", "method": "absmax", **wrong})  # type: ignore[arg-type]
