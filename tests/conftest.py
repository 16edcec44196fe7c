"""Fixtures that several folders share. What is slow to make (a checkpoint, its graphs, its engine) is made once per
session, also when several workers run it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = {
    "04_precision_lab.ipynb": 95,
    "test_notebooks_in_a_page.py": 180,
    "test_instruments.py": 90,
    "test_panels_in_a_page.py": 60,
    "test_instruments_of_engines.py": 30,
    "test_exported_notebooks.py": 40,
    "test_architectures.py": 60,
    "test_fuzz.py": 40,
    "01_checkpoint_to_engine.ipynb": 32,
    "test_calibrated.py": 35,
    "test_properties.py": 30,
    "test_traffic.py": 28,
    "test_cli.py": 28,
    "test_fold.py": 27,
    "test_from_onnx.py": 30,
    "test_memory.py": 24,
    "test_packaging.py": 24,
    "test_calibrate.py": 20,
    "test_nemo.py": 18,
    "test_readme.py": 17,
}
"""Seconds that the longest files take, roughly. A notebook that isn't here counts as 60; other files fill up."""


NIGHTLY = ("02_your_own_model", "06_attention_and_kv_cache_from_scratch")
"""Notebooks that `make test-all` runs; what they show is checked as it was saved in each run."""
NIGHTLY_CASES = (
    "test_architectures.py::test_a_shallow_engine_answers_like_transformers[cohere]",
    "test_architectures.py::test_a_shallow_engine_answers_like_transformers[falcon (ALiBi)]",
    "test_architectures.py::test_a_shallow_engine_answers_like_transformers[gpt2]",
    "test_architectures.py::test_a_shallow_engine_answers_like_transformers[gptj]",
    "test_architectures.py::test_a_shallow_engine_answers_like_transformers[opt]",
    "test_architectures.py::test_a_shallow_engine_answers_like_transformers[phi3 (longrope, long)]",
    "test_convert.py::test_weights_stored_narrow_stay_maps_into_the_checkpoint",
    "test_fold.py::test_the_model_stays_the_same[llama3-kinds1]",
    "test_fold.py::test_the_model_stays_the_same[mistral-kinds4]",
    "test_fold.py::test_the_model_stays_the_same[qwen2-kinds2]",
    "test_from_onnx.py::test_a_file_gives_what_its_checkpoint_gives[attention mask]",
    "test_from_onnx.py::test_narrow_graphs_compute_in_float32_on_weights_as_they_are_stored[10]",
    "test_memory.py::test_weights_are_never_in_memory[build-bfloat16]",
    "test_nemo.py::test_a_gpt2_gives_the_same_logits",
    "test_nemo.py::test_a_nemotron_gives_the_same_logits",
    "test_onnxruntime_backend.py::test_slots_cost_what_their_tokens_cost",
    "test_quant_families.py::test_families[mixtral]",
    "test_rope_config.py::test_the_command_line_chooses_too",
    "test_tied.py::test_the_embedding_is_stored_once[dtype0-cohere]",
)
"""The dearest cases of tests whose other cases run with each change: `make test-all` runs these as well."""
RUN_IN_A_BROWSER = ("01_checkpoint_to_engine", "05_in_flight_batching", "08_chat_with_and_compare_engines")
"""Notebooks that tests/browser runs where a browser is required, and nbmake need not run again."""


@pytest.hookimpl(trylast=True)  # when those that don't run are gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first. Each of two workers begins with one half of the list, so they are dealt to the two halves; the rest
    fills them up. The tests that run last are short, then, and both workers end together."""
    if config.option.markexpr == "not slow":
        items[:] = [i for i in items if not (i.path.suffix == ".ipynb" and i.path.stem in NIGHTLY)]
        items[:] = [i for i in items if not i.nodeid.endswith(NIGHTLY_CASES)]
    if os.environ.get("LLMLAB_BROWSER") == "required":
        items[:] = [i for i in items if not (i.path.suffix == ".ipynb" and i.path.stem in RUN_IN_A_BROWSER)]
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def seconds(path: Path) -> float:
        return LONG.get(path.name, 60 if path.suffix == ".ipynb" else 0)

    halves: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    load = [0.0, 0.0]
    for path in sorted(files, key=seconds, reverse=True):  # files that are alike stay in order
        half = load[1] < load[0] if seconds(path) else len(halves[0]) > len(items) // 2
        halves[half].extend(files[path])
        load[half] += seconds(path)
    items[:] = halves[0] + halves[1]


class Store:
    """Checkpoints, graphs and engines of tinychat and the models in `tiny.MODELS`, by name, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: dict[str, Any] = {}
        self._graphs: dict[Path, Any] = {}

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path `name`, made by `make` unless this or another worker has done so."""
        path = self.folder / name
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    def checkpoint(self, name: str) -> Path:
        if name == "tinychat":
            from llmlab import zoo

            return zoo.path(name)
        return self.once(f"{name}.checkpoint", lambda path: tiny.write_checkpoint(path, tiny.MODELS[name]))

    def plain(self, name: str) -> Any:
        from llmlab.graph.export import export

        source = self.checkpoint(name)
        return self._graph(self.once(f"{name}.plain", lambda path: export(source).save(path)))

    def serving(self, name: str) -> Any:
        from llmlab.graph.optimize import optimize

        return self._graph(self.once(f"{name}.serving", lambda path: optimize(self.plain(name)).save(path)))

    def engine(self, name: str) -> Path:
        """An engine folder; tests that alter it work on a copy."""
        from llmlab.build import build

        return self.once(f"{name}.engine", lambda path: build(self.serving(name), path, max_tokens_per_step=32))

    def _graph(self, path: Path) -> Any:
        """The graph in `path`, to be read; tests that rewrite it work on a copy."""
        from llmlab.graph.graph import Graph

        if path not in self._graphs:
            self._graphs[path] = Graph.load(path)
        return self._graphs[path]

    def model(self, name: str) -> Any:
        """The transformers model of the checkpoint: the oracle."""
        if name not in self._models:
            from transformers import AutoModelForCausalLM

            self._models[name] = AutoModelForCausalLM.from_pretrained(self.checkpoint(name)).eval()
        return self._models[name]

    def demo(self) -> Path:
        """The folder in which `make demo` ran once, its engine of tinychat included; printed.json has (exit code, output,
        errors)."""

        def make(folder: Path) -> None:
            folder.mkdir()
            command = (sys.executable, "-m", "llmlab.demo")
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            (folder / "printed.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

        return self.once("demo", make)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-models"
    folder.mkdir(exist_ok=True)
    return Store(folder)
