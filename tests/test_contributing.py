"""The worked example in CONTRIBUTING.md is code that runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_of_a_pass_passes_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    the_pass, its_tests = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    module = ModuleType("llmlab.graph.passes.square")
    exec(compile(the_pass, "square.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tests: dict[str, object] = {}
    exec(compile(its_tests, "test_square.py", "exec"), tests)
    found = [value for name, value in tests.items() if name.startswith("test_")]
    assert len(found) == 2
    for test in found:
        test()  # type: ignore[operator]

    monkeypatch.setattr(module.Square, "check", lambda *_: None)
    with pytest.raises(AssertionError):
        found[1]()  # type: ignore[operator]


def test_what_it_names_exists() -> None:
    root = Path(__file__).parents[1]
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"(?:`|^\$ )make (\w[\w-]*)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in re.findall(r"`((?:llmlab|tests|notebooks|benchmarks)/[\w/.]*)`", TEXT):
        assert (root / path).exists() or path.endswith("test_square.py"), path
