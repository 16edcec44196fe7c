"""The bench panel: latencies add up, histograms count every value, the roofline is where its ceilings say, Stop stops."""

from __future__ import annotations

import json
import re
import threading

import pytest

from llmlab.errors import EngineError, InputError
from llmlab.evaluate.latencies import Latencies
from llmlab.evaluate.roofline import Point, Roofline, measure_roofline
from llmlab.widgets.bench_panel import panel as panel_module
from llmlab.widgets.bench_panel.draw import histogram
from llmlab.widgets.bench_panel.panel import bench

ROOF = Roofline(1e10, 1e11, 2e11, 2, "by hand")


@pytest.fixture
def no_machine(monkeypatch):
    monkeypatch.setattr(panel_module, "measure_roofline", lambda threads, stop: ROOF)


def test_an_engine_is_measured(store, no_machine) -> None:
    panel = bench(store.engine("llama"), (1, 2), prompt=6, output=4, repeat=2, threads=1)
    data = panel.result()
    json.dumps(data)
    assert data["state"] == "done" and [row["batch"] for row in data["batches"]] == [1, 2]
    for row in panel.rows:
        assert len(row.first_token) == len(row.whole) == 2 and len(row.between_tokens) == 2 * 3
        assert sum(row.between_tokens) < sum(row.whole), "steps are a part of the runs"
        assert row.tokens_per_s == pytest.approx(row.batch * 4 / min(row.whole))
        assert row.percentile("between_tokens", 50) <= row.percentile("between_tokens", 99)
    assert [point.label for point in panel.points] == ["prefill, 6 tokens", "decode, B=1", "decode, B=2"]
    assert panel.points[2].flops == 2 * panel.points[1].flops, "two sequences, the same weights"
    assert panel.points[1].bytes < panel.points[2].bytes < 2 * panel.points[1].bytes
    html = panel.html()
    assert "Roofline" in html and html.count("<svg") == 3 and "http" not in html and "B=2" in str(panel)


def test_a_roofline_has_two_parts() -> None:
    assert ROOF.ridge == 10 and ROOF.limit(1) == 1e10 and ROOF.limit(10) == ROOF.limit(1000) == 1e11
    point = Point("x", flops=400, bytes=100, seconds=2)
    assert (point.intensity, point.flops_per_s) == (4, 200)


def test_this_machine_has_ceilings() -> None:
    found = measure_roofline(1)
    assert 1e8 < found.bytes_per_s < 1e13 and 1e8 < found.flops_per_s < 1e14 and found.int8_ops_per_s > 1e8
    assert "128 MiB" in found.method
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        measure_roofline(1, stop)


def test_a_histogram_holds_every_value() -> None:
    svg = str(histogram([0.001] * 3 + [0.002] + [0.004] * 2, "gaps"))
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" fill', svg)]
    assert len(heights) == 3 and sorted(round(h / max(heights) * 3) for h in heights) == [1, 2, 3]
    assert "6 values from 1.00 to 4.00 ms" in svg and "p50" in svg and "p99" in svg
    assert "<rect" in str(histogram([0.001], "one"))


def test_it_can_be_stopped_and_keeps_what_it_has(store, monkeypatch) -> None:
    began = threading.Event()
    row = Latencies(1, 2, 3, (0.1,), (0.01, 0.02), (0.2,))

    def slow(engine, batches, *, stop, done, **options):
        done(row)
        began.set()
        assert stop.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(panel_module, "measure_latencies", slow)
    panel = bench(store.engine("llama"), prompt=2, output=3)
    assert began.wait(30) and "Stop" in panel.html()
    panel.act("stop")
    panel.stop()
    assert panel.state == "stopped" and panel.rows == [row] and "Measure again" in panel.html()
    with pytest.raises(KeyboardInterrupt):
        panel.result()


def test_what_fails_is_said(store, monkeypatch) -> None:
    def broken(*args, **options):
        raise EngineError("the engine is broken")

    monkeypatch.setattr(panel_module, "measure_latencies", broken)
    panel = bench(store.engine("llama"), prompt=2, output=3)
    with pytest.raises(EngineError):
        panel.result()
    assert "the engine is broken" in panel.html()


def test_bad_input(store) -> None:
    engine = store.engine("llama")
    for options in ({"batches": ()}, {"batches": (0,)}, {"prompt": 0}, {"repeat": True}, {"prompt": 60000}):
        with pytest.raises(InputError):
            bench(engine, **options)
