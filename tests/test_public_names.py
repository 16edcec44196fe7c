"""What `import llmlab` gives, when it is loaded, and that `llmlab.build` is always the function."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llmlab


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_llmlab_loads_nothing() -> None:
    code = "import sys, llmlab; print([m for m in sys.modules if m.startswith('llmlab.') or m in ('numpy', 'onnx')])"
    assert python(code) == "[]"


@pytest.mark.parametrize("name", llmlab.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(llmlab)
    value = getattr(llmlab, name)
    if name != "__version__":
        assert callable(value) and value.__name__ == name and value.__doc__
    assert llmlab.__dict__[name] is value, "the second use costs nothing"


def test_star_import_and_unknown_names() -> None:
    assert python("from llmlab import *; print(LLM.__name__, build.__name__)") == "LLM build"
    with pytest.raises(AttributeError, match="module 'llmlab' has no attribute 'nothing'"):
        _ = llmlab.nothing
    assert not hasattr(llmlab, "__wrapped__")


@pytest.mark.parametrize(
    "before",
    [
        "pass",
        "import llmlab.build",
        "from llmlab.build import build",
        "import importlib; importlib.import_module('llmlab.build')",
        "ll.build",
        "ll.build; import llmlab.build",
        "import llmlab.build as b; assert callable(b)",
        "import llmlab.cli, llmlab.runtime.llm, llmlab.build, llmlab.graph",
    ],
)
def test_build_is_the_function_whatever_was_imported_before(before: str) -> None:
    after = "print(type(ll.build).__name__, ll.build is sys.modules['llmlab.build'].build)"
    code = f"import llmlab as ll, sys\n{before}\n{after}"
    assert python(code) == "function True"


def test_ordinary_submodules_are_bound_as_ever() -> None:
    assert python(
        "import llmlab.errors, llmlab.graph.export as e; print(type(llmlab.errors).__name__, e.__name__)"
    ) == ("module llmlab.graph.export")
