"""`make demo` as a stranger sees it: one line a step, right answers, nothing on standard error; quick the second time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmlab import demo
from llmlab.runtime.engine import Engine

COMMAND = (sys.executable, "-m", "llmlab.demo")
NINE = "un, deux, trois, quatre, cinq, six, sept, huit, neuf."


@pytest.fixture(scope="session")
def first_run(store: Any) -> Path:
    folder = store.demo()
    assert isinstance(folder, Path)
    return folder


def test_first_run_shows_each_step_and_the_answers(first_run: Path) -> None:
    code, out, errors = json.loads((first_run / "printed.json").read_text())
    assert (code, errors) == (0, ""), "no stray warnings"
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["export", "optimize", "build"]
    assert all(line.endswith(" s") for line in lines[:3])
    asked = [f"> {prompt}".replace("\n", "\n  ").splitlines()[-1] for prompt in demo.PROMPTS]
    assert [lines[lines.index(line) + 1] for line in asked] == [NINE, "e-n-i-g-n-e", "Clara has 7 shells."]
    assert "tokens/s" in out and "llmlab chat engines/tinychat" in out
    assert "\x1b" not in out and max(map(len, lines)) <= 100, "readable in a log"
    assert sorted(p.name for p in (first_run / "engines").iterdir()) == ["tinychat"]


def test_second_run_reuses_the_engine(first_run: Path) -> None:
    before = (first_run / demo.ENGINE / "manifest.json").stat().st_mtime_ns
    start = time.perf_counter()
    done = subprocess.run(COMMAND, cwd=first_run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and time.perf_counter() - start < 20
    assert done.stdout.startswith(f"{demo.ENGINE} is there already") and NINE in done.stdout
    assert (first_run / demo.ENGINE / "manifest.json").stat().st_mtime_ns == before


def test_ctrl_c_is_one_line(first_run: Path) -> None:
    running = subprocess.Popen(
        COMMAND, cwd=first_run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    running.stdout.readline()  # it is past its imports and has begun
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors.strip()) == (130, "stopped")


def altered(engine: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(engine, target)
    manifest = target / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))
    return target


def test_an_engine_that_does_not_fit_is_not_reused(first_run: Path, tmp_path: Path) -> None:
    engine = first_run / demo.ENGINE
    assert isinstance(demo._reuse(engine), Engine)
    assert isinstance(demo._reuse(altered(engine, tmp_path / "same")), Engine)
    assert demo._reuse(tmp_path / "missing") is None
    assert demo._reuse(altered(engine, tmp_path / "version", llmlab="0.0.1")) is None
    model = json.loads((engine / "manifest.json").read_text())["model"]
    assert demo._reuse(altered(engine, tmp_path / "model", model=model | {"num_hidden_layers": 5})) is None
    old = altered(engine, tmp_path / "old")
    os.utime(old / "manifest.json", (1, 1))
    assert demo._reuse(old) is None, "llmlab's files are newer than it"
    torn = altered(engine, tmp_path / "torn")
    (torn / "weights.bin").write_bytes(b"")
    assert demo._reuse(torn) is None


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / demo.ENGINE / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "", "it is refused before the work, not after it"
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "engines/tinychat is there" in done.stderr
    assert mine.read_text() == "years of work"
