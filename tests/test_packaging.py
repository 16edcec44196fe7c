"""What is distributed, and that it works where only the core dependencies are installed.

One fixture builds the source distribution, the wheel from it, and a bare environment with the wheel in it. What the wheel
asks for is linked in from the environment of the tests, which has it in the same versions; a nightly test has pip install it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llmlab
from llmlab import zoo

ROOT = Path(__file__).parents[1]
NEVER_SHIPPED = (".*", "__pycache__", "*.egg-info", "engines", "runs", "build", "dist")
OPTIONAL = ("torch", "transformers", "onnxscript", "ipykernel", "jupyterlab", "ipywidgets", "pytest")
IDS = [[5, 9, 17, 3], [7, 7, 1, 30, 12, 11, 2], [64]]
MESSAGES = [{"role": "user", "content": "How do I count to nine in French?"}]

WALK = """
import importlib, json, pkgutil, sys
import llmlab
report = {}
for module in pkgutil.walk_packages(llmlab.__path__, "llmlab."):
    if module.name != "llmlab.__main__":
        try:
            importlib.import_module(module.name)
            report[module.name] = None
        except BaseException as error:
            report[module.name] = [type(error).__name__, str(error)]
print(json.dumps({"modules": report, "loaded": sorted(sys.modules)}))
"""
RUN = """
import json, sys
import llmlab as ll
from llmlab import zoo
from llmlab.text.tokenizer import Tokenizer
engine, ids, messages = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
with ll.LLM(engine, threads=1) as llm:
    tokens = [r.token_ids for r in llm.generate(ids, ll.SamplingParams(max_tokens=12, ignore_eos=True))]
text, prompt_ids = Tokenizer(zoo.path()).encode_chat(messages)
print(json.dumps({"tokens": tokens, "text": text, "prompt_ids": list(prompt_ids), "where": ll.__file__}))
"""


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, f"{command[:4]} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def link_core(site: Path) -> None:
    """Link into `site` the files of what the distribution there asks for, and of what that asks for."""
    [wheel] = importlib.metadata.distributions(name="llmlab", path=[str(site)])
    pending, met = deque(required(wheel)), {"llmlab"}
    while pending:
        name = pending.popleft()
        if name in met:
            continue
        met.add(name)
        found = importlib.metadata.distribution(name)
        pending.extend(required(found))
        for file in found.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(file.locate())


def required(distribution: importlib.metadata.Distribution) -> list[str]:
    """The names of what it asks for here, without extras."""
    asked = map(Requirement, distribution.requires or ())
    return [canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]


class Distribution:
    """The sdist, the wheel, and a Python that has the wheel and its core dependencies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bare" / "bin" / "python"

    @classmethod
    def make(cls, folder: Path) -> None:
        folder.mkdir()
        source = folder / "source"
        # A copy, since a build leaves files behind, and takes in what an earlier one left.
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NEVER_SHIPPED))
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
        made = cls(folder)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "bare", cwd=folder)
        made.pip("install", "--quiet", "--no-deps", "--no-index", "--no-compile", made.wheel)
        [there] = (folder / "bare" / "lib").glob("python*/site-packages")
        link_core(there)

    def pip(self, *arguments: str | Path) -> str:
        """pip of the tests' environment, at work in the bare one."""
        command = (sys.executable, "-m", "pip", "--python", self.python, *arguments)
        return run(*command, cwd=self.folder).stdout

    @property
    def wheel(self) -> Path:
        [path] = (self.folder / "dist").glob("*.whl")
        return path

    @property
    def sdist(self) -> Path:
        [path] = (self.folder / "dist").glob("*.tar.gz")
        return path

    def wheel_files(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def sdist_files(self) -> dict[str, bytes]:
        """Without the top folder, which carries the version."""
        with tarfile.open(self.sdist) as archive:
            return {m.name.partition("/")[2]: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]

    def outside(self) -> Path:
        """A working folder where no source tree can be imported from."""
        path = self.folder / "elsewhere"
        path.mkdir(exist_ok=True)
        return path


@pytest.fixture(scope="session")
def distribution(store: Any) -> Distribution:
    return Distribution(store.once("distribution", Distribution.make))


def package_files() -> set[str]:
    package = ROOT / "llmlab"
    return {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "**/*.py",
            "py.typed",
            "graph/architectures.json",
            "widgets/*.js",
            "widgets/*.css",
            "zoo/tinychat/*",
        )
        for path in package.glob(pattern)
    }


def test_the_wheel_holds_the_package_and_nothing_else(distribution: Distribution) -> None:
    files = set(distribution.wheel_files())
    info = {name for name in files if ".dist-info/" in name}
    assert files - info == package_files()
    assert "llmlab/zoo/tinychat/model.safetensors" in files and "llmlab/py.typed" in files
    assert any(name.endswith("/licenses/LICENSE") for name in info)


def test_the_wheel_asks_for_the_core_only(distribution: Distribution) -> None:
    [metadata] = [data.decode() for name, data in distribution.wheel_files().items() if name.endswith("/METADATA")]
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*(;.*)?$", metadata, re.M)
    core = {name.lower().replace("_", "-") for name, marker in needed if not marker}
    assert {"numpy", "onnx", "onnxruntime", "typer"} <= core and not core & set(OPTIONAL)
    assert any(name == "torch" and 'extra == "export"' in marker for name, marker in needed)
    assert f"Version: {llmlab.__version__}" in metadata and "License-Expression: Apache-2.0" in metadata


def test_the_source_distribution_is_the_repository(distribution: Distribution) -> None:
    files = set(distribution.sdist_files())
    assert package_files() <= files
    assert {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "tests/conftest.py"} <= files
    assert "notebooks/01_checkpoint_to_engine.ipynb" in files
    made = re.compile(r"(^|/)(__pycache__|\.venv|\.git|engines|runs|dist|\.\w+_cache)/|\.(pyc|whl|plan)$")
    assert [name for name in files if made.search(name)] == []
    assert made.search("notebooks/engines/tinychat/weights.bin"), "the pattern finds one"


def hosts(files: dict[str, bytes]) -> Iterator[str]:
    for name, data in files.items():
        if name.endswith((".safetensors", ".png")):
            continue
        yield from re.findall(r"\w+://([\w.-]+)", data.decode("utf-8"))


def test_no_network_host_is_written_anywhere(distribution: Distribution) -> None:
    own = "LICENSE"  # which gives its own address, as it must
    assert set(hosts({own: distribution.sdist_files()[own]})) == {"www.apache.org"}, "the search finds one"
    for files in (distribution.wheel_files(), distribution.sdist_files()):
        assert set(hosts({n: d for n, d in files.items() if not n.endswith((own, "test_packaging.py"))})) == set()


def test_bare_environment_has_the_core_only(distribution: Distribution) -> None:
    installed = packages(distribution)
    assert "llmlab" in installed and "onnxruntime" in installed
    assert installed & set(OPTIONAL) == set()
    assert {"torch", "pytest"} <= {canonicalize_name(d.name) for d in importlib.metadata.distributions()}


def packages(distribution: Distribution) -> set[str]:
    return {canonicalize_name(entry["name"]) for entry in json.loads(distribution.pip("list", "--format=json"))}


@pytest.mark.slow
def test_pip_installs_what_is_linked_there(distribution: Distribution, tmp_path: Path) -> None:
    """From the package index that pip is set up with."""
    other = Distribution(tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare", cwd=tmp_path)
    other.pip("install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", distribution.wheel)
    assert packages(other) == packages(distribution)
    assert run(other.python, "-m", "llmlab", "--version", cwd=tmp_path).stdout.strip() == llmlab.__version__


def test_every_module_imports_there_or_names_the_extra(distribution: Distribution) -> None:
    report = json.loads(run(distribution.python, "-c", WALK, cwd=distribution.outside()).stdout)
    modules = report["modules"]
    paths = (Path(name).with_suffix("") for name in package_files() if name.endswith(".py"))
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    assert set(modules) == names - {"llmlab", "llmlab.__main__"}
    for name, failure in modules.items():
        if failure is not None:
            kind, message = failure
            assert kind == "MissingDependencyError" and re.search(r"pip install 'llmlab\[\w+\]'$", message), name
            assert "\n" not in message, name
    assert modules["llmlab.graph.export"] is None and modules["llmlab.runtime.llm"] is None
    assert set(report["loaded"]) & set(OPTIONAL) == set()


def test_command_line_there(distribution: Distribution) -> None:
    command = distribution.python.with_name("llmlab")
    assert "build" in run(command, "--help", cwd=distribution.outside()).stdout
    assert run(command, "--version", cwd=distribution.outside()).stdout.strip() == llmlab.__version__
    refused = run(command, "export", "tinychat", "-o", "graph", cwd=distribution.outside(), code=2)
    assert refused.stderr.count("\n") == 1 and "pip install 'llmlab[export]'" in refused.stderr
    assert not (distribution.outside() / "graph").exists()


def test_an_engine_built_here_runs_there(distribution: Distribution, store: Any, tmp_path: Path) -> None:
    from llmlab.runtime.llm import LLM
    from llmlab.runtime.params import SamplingParams
    from llmlab.text.tokenizer import Tokenizer

    engine = store.engine("llama")
    with LLM(engine, threads=1) as llm:
        here = [r.token_ids for r in llm.generate(IDS, SamplingParams(max_tokens=12, ignore_eos=True))]
    moved = shutil.copytree(engine, tmp_path / "another place" / "engine")
    arguments = (moved, json.dumps(IDS), json.dumps(MESSAGES))
    there = json.loads(run(distribution.python, "-c", RUN, *arguments, cwd=distribution.outside()).stdout)
    assert there["tokens"] == here and len({tuple(tokens) for tokens in here}) == len(IDS)
    text, prompt_ids = Tokenizer(zoo.path()).encode_chat(MESSAGES)
    assert (there["text"], there["prompt_ids"]) == (text, list(prompt_ids))
    assert not Path(there["where"]).is_relative_to(ROOT), "it was the installed one that ran"
