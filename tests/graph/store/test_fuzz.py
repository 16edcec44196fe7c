"""Mutated files: each opens, or is refused in one line. Never another exception, a crash, a hang, or a write elsewhere.

A worker process does the opening, so that a native crash is seen and is the case's own; `mutations.py` makes the cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
from conftest import Store
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import Worker

CASES, BATCH = 2000, 20
SLOW_CASES = 20_000


@pytest.fixture(scope="module")
def seeds(store: Store, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of valid files: plain, opset 18, of a real model, and one that `Graph.save` wrote."""
    return mutations.seeds(store, tmp_path_factory.mktemp("seeds"))


def search(seeds: list[Path], folder: Path, cases: int) -> None:
    """`cases` mutations, in batches that hypothesis draws and shrinks; a failure names the seed and the number of its case."""
    count = 0
    with Worker(folder) as worker:

        @seed(0)
        @settings(
            max_examples=cases // BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(numbers=st.lists(st.integers(0, 2**32), min_size=BATCH, max_size=BATCH, unique=True))
        def cases_hold(numbers: list[int]) -> None:
            nonlocal count
            for number in numbers:
                problem = worker.check(mutations.mutant(seeds, number), number)
                assert problem is None, f"case {number}: {problem}"
                count += 1

        cases_hold()
    assert count >= cases


def test_mutated_files_open_or_are_refused(seeds: list[Path], tmp_path: Path) -> None:
    search(seeds, tmp_path, CASES)


@pytest.mark.slow
def test_many_more_mutated_files(seeds: list[Path], tmp_path: Path) -> None:
    search(seeds, tmp_path, SLOW_CASES)


@pytest.mark.parametrize("flaw", ["unchecked", "crash", "hang", "write", "two lines"])
def test_a_flaw_is_noticed(seeds: list[Path], tmp_path: Path, flaw: str) -> None:
    """Without the checks, or with a flaw put in, the search fails."""
    limit = 3 if flaw == "hang" else 10
    with pytest.raises(AssertionError, match=mutations.FLAWS[flaw]), Worker(tmp_path, flaw=flaw, limit=limit) as worker:
        for number in range(400):
            problem = worker.check(mutations.mutant(seeds, number), number)
            assert problem is None, f"case {number}: {problem}"


def test_the_worker_is_the_only_one_who_dies(seeds: list[Path], tmp_path: Path) -> None:
    """After a crash, the next case is judged by a new process."""
    with Worker(tmp_path, flaw="crash") as worker:
        assert worker.check(mutations.mutant(seeds, 1), 1) is None
        first = worker.pid
        assert "crash" in (worker.check(mutations.mutant(seeds, 0), 0) or "")
        assert worker.check(mutations.mutant(seeds, 2), 2) is None
        assert worker.pid != first != os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("flaw", ["", "two lines", "unchecked"])
def test_files_steered_by_coverage(tmp_path: Path, flaw: str) -> None:
    """atheris finds nothing in ten seconds, and at once what is put in."""
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    tests = Path(mutations.__file__).parent
    path = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, tests / "fuzz" / "onnx_file.py", "-max_total_time=10", "-timeout=60", "-seed=1"],
        cwd=tmp_path,  # where libFuzzer leaves what it found
        env=os.environ | {"LLMLAB_FUZZ_FLAW": flaw, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [p.name for p in tmp_path.glob("*-*")]
    if flaw:
        expected = {"two lines": "AssertionError: two lines: one", "unchecked": "AssertionError: raises "}
        assert done.returncode != 0 and found and expected[flaw] in done.stdout + done.stderr
    else:
        assert done.returncode == 0 and not found, f"{found}\n{done.stderr[-4000:]}"
        assert "Done " in done.stderr
