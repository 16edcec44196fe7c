"""A build that is watched: its stages and times, stopping it without leaving anything, failing, and what is shown."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

import llmlab
from llmlab.errors import InputError
from llmlab.progress import Progress, begins, byte_bar, make_bar, watched
from llmlab.widgets.build_panel import run as run_module
from llmlab.widgets.build_panel.panel import watch_build


def test_it_builds_and_says_what_took_how_long(store, tmp_path: Path) -> None:
    panel = watch_build(store.serving("llama"), tmp_path / "e", max_seq_len=32)
    heard: list[dict[str, str]] = []
    panel.listen(heard.append)
    engine = panel.result()
    panel.run.wait()
    assert engine.path == tmp_path / "e" and llmlab.Engine.load(engine.path).manifest == engine.manifest
    data = panel.to_dict()
    json.dumps(data)
    assert data["state"] == "done" and data["bytes"] == engine.size
    names = [stage["name"] for stage in data["stages"]]
    assert names == [
        "lowering the graph",
        "writing model.onnx and its weights",
        "hashing the files",
        "moving the folder into place",
    ]
    total = sum(stage["seconds"] for stage in data["stages"])
    assert total <= data["seconds"] <= total + 5
    html = panel.html()
    assert "weights.bin" in html and "ll.inspect(" in html and "%" not in html.replace("100%", ""), "no percentages"
    assert "done" in str(panel)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_stopped_build_leaves_nothing(store, tmp_path: Path, monkeypatch) -> None:
    at_work, go_on = threading.Event(), threading.Event()
    real = run_module.build

    def slow(graph, folder, **options):
        begins("waiting")
        at_work.set()
        assert go_on.wait(30)
        return real(graph, folder, **options)

    monkeypatch.setattr(run_module, "build", slow)
    panel = watch_build(store.serving("llama"), tmp_path / "e", max_seq_len=32)
    assert at_work.wait(30)
    assert "Stop" in panel.html()
    panel.act("stop")
    assert panel.run.state == "stopping"
    go_on.set()
    panel.stop()
    assert panel.run.state == "stopped" and "nothing was left behind" in panel.html()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        panel.result()


def test_a_build_is_stopped_while_weights_are_written(store, tmp_path: Path) -> None:
    """The control of the test above: the folder is there when the stop comes."""
    seen: list[list[str]] = []

    def stop_in_the_middle(told: Progress | str) -> None:
        if isinstance(told, Progress) and told.unit == "B":
            seen.append([path.name for path in tmp_path.iterdir()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(stop_in_the_middle):
        llmlab.build(store.serving("llama"), tmp_path / "e", max_seq_len=32)
    assert seen[0][0].endswith(".partial") and list(tmp_path.iterdir()) == []


def test_a_build_that_fails_says_why(store, tmp_path: Path) -> None:
    panel = watch_build(store.serving("llama"), tmp_path / "e", target="onnxruntime", prefill="int9")
    with pytest.raises(InputError, match="int9"):
        panel.result()
    assert panel.run.state == "failed" and "int9" in panel.html() and list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="expected a Graph"):
        watch_build("graph", tmp_path / "e")  # type: ignore[arg-type]


def test_the_page_is_told_while_it_runs(store, tmp_path: Path, monkeypatch) -> None:
    go_on = threading.Event()

    def never(graph, folder, **options):
        assert go_on.wait(30)
        raise InputError("enough")

    monkeypatch.setattr(run_module, "build", never)
    panel = watch_build(store.serving("llama"), tmp_path / "e")
    heard: list[dict[str, str]] = []
    panel.listen(heard.append)
    deadline = time.monotonic() + 20
    while len(heard) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    panel.close()
    go_on.set()
    panel.run.wait()
    assert len(heard) >= 2 and {"state", "stages", "log"} <= set(heard[0])


def test_bars_tell_who_watches() -> None:
    told: list[Progress | str] = []
    with watched(told.append):
        begins("one")
        with byte_bar(10, "weights") as advance:
            advance(4)
        bar, close = make_bar(3, unit="part")
        bar.update()
        bar.set_description_str("x")
        close()
    begins("unheard")
    assert told == ["one", Progress("weights", 4, 10, "B"), Progress("", 1, 3, "part"), Progress("x", 1, 3, "part")]
