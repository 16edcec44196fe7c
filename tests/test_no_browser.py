"""Where there is no Chromium, the browser tests say so: they skip, and fail where a browser is required."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import conftest as browser

ONE = "browser/test_exported_notebooks.py::test_the_check_sees_what_is_missing"
LINE = "no Chromium here (apt-get install chromium)"


def test_they_skip_or_fail(monkeypatch) -> None:
    marks: list[pytest.MarkDecorator] = []
    items = [
        SimpleNamespace(path=path, add_marker=marks.append) for path in (browser.HERE / "test_x.py", Path(__file__))
    ]
    monkeypatch.setattr(browser, "MISSING", LINE)
    monkeypatch.delenv("LLMLAB_BROWSER", raising=False)
    browser.pytest_collection_modifyitems(items)
    assert [mark.kwargs["reason"] for mark in marks] == [f"browser test: {LINE}"], "of the tests in its folder alone"
    monkeypatch.setenv("LLMLAB_BROWSER", "required")
    browser.pytest_collection_modifyitems(items)
    assert len(marks) == 1
    with pytest.raises(pytest.fail.Exception, match="LLMLAB_BROWSER=required, and no Chromium"):
        browser.need_chromium()
    monkeypatch.setattr(browser, "MISSING", "")
    browser.need_chromium()


@pytest.mark.slow
@pytest.mark.parametrize(
    "required, code, said",
    [("", 0, f"browser test: {LINE}"), ("required", 1, f"LLMLAB_BROWSER=required, and {LINE}")],
    ids=["skipped", "required"],
)
def test_pytest_says_it(required: str, code: int, said: str, tmp_path: Path) -> None:
    here = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "LLMLAB_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", ONE],
        cwd=Path(__file__).parent,
        env=here | {"PATH": str(tmp_path), "LLMLAB_BROWSER": required},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code and said in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stdout and "playwright" not in done.stdout
