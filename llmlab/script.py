"""An engine → the Python script that rebuilds it and checks that it did."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmlab.errors import InputError
from llmlab.provenance import Step
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import LAYERS, MANIFEST, Manifest
from llmlab.tensorrt.config import BuildConfig

_TIMED = (LAYERS, ".plan")
"""Ends of the names of files that depend on what a TensorRT measured while it built."""


def script(engine: Engine | str | Path) -> str:
    """The Python script that makes this engine again from its source, as its manifest's `steps` tell.

    The script ends with an error that names the files whose sha256 is another one than this engine's. TensorRT's plans are not
    among them: it times kernels while it builds, and no two plans need be alike. What no text holds, such as a torch module, the
    script asks for. Raises InputError for an engine whose manifest has no steps, and EngineError for one that can't be read.
    """
    engine = engine if isinstance(engine, Engine) else Engine.load(engine)
    manifest = engine.manifest
    steps = [Step.from_dict(entry) for entry in manifest.steps]
    if not steps:
        raise InputError(
            f"{engine.path}: its {MANIFEST} has no steps, it was built before they were kept: build it again"
        )
    return "\n".join([*_head(engine.path.name, manifest), *_calls(steps), *_check(manifest)]) + "\n"


def _head(name: str, manifest: Manifest) -> Iterator[str]:
    yield f'"""Rebuild the {manifest.target} engine {_one_line(name)}: python SCRIPT [FOLDER]."""'
    yield ""
    yield "import sys"
    yield ""
    yield "import llmlab as ll"
    yield ""
    yield f"FOLDER = sys.argv[1] if len(sys.argv) > 1 else {_literal(name)}"


def _calls(steps: list[Step]) -> Iterator[str]:
    yield ""
    if steps[0].call != "export":
        yield "# The graph that this began with was not made by llmlab.export: open it here."
        yield 'sys.exit("assign the graph that the engine was made of")'
        yield "graph = None"
    for step in steps:
        yield from (f"# {_one_line(note)}" for note in step.notes)
        for name, what in step.missing.items():
            yield f"# {name} was {_one_line(what)}, which no script can hold: assign it, and delete the line below."
            yield f"sys.exit({_literal(f'assign {name}: {_one_line(what)}')})"
            yield f"{name} = None"
        yield _call(step)


def _call(step: Step) -> str:
    """One line of Python. Raises InputError for arguments that the function doesn't have: the manifest was altered."""
    import llmlab

    known = inspect.signature(getattr(llmlab, step.call)).parameters
    for name in (*step.arguments, *step.missing):
        if name not in known:
            raise InputError(
                f"the engine's {MANIFEST} gives llmlab.{step.call} an argument {name!r}: another llmlab wrote it"
            )
    values = {name: _value(step.call, name, value) for name, value in step.arguments.items()}
    values |= {name: name for name in step.missing}
    if step.call == "export" and "source" not in values:
        raise InputError(f"the engine's {MANIFEST} gives llmlab.export no source: altered, build the engine again")
    given = [values.pop("source")] if step.call == "export" else ["graph"]
    if step.call == "build":
        given.append("FOLDER")
    for name in ("precision", "recipe"):  # read better without their names, and stand behind the graph
        if step.call in ("convert", "quantize") and name in values:
            given = [*given, values.pop(name)]
    given = [*given, *(f"{name}={value}" for name, value in values.items())]
    result = "engine" if step.call == "build" else "graph"
    return f"{result} = ll.{step.call}({', '.join(given)})"


def _value(call: str, name: str, value: Any) -> str:
    if call == "build" and name == "config" and isinstance(value, Mapping):
        fields = [f"{field}={_literal(inner)}" for field, inner in value.items() if field in vars(BuildConfig())]
        return f"ll.BuildConfig({', '.join(fields)})"
    return _literal(value)


def _check(manifest: Manifest) -> Iterator[str]:
    compiled = manifest.compiled is not None
    expected = {
        name: file["sha256"] for name, file in manifest.files.items() if not (compiled and name.endswith(_TIMED))
    }
    yield ""
    yield "# sha256 of the files of the engine that this script is of."
    yield "EXPECTED = {"
    yield from (f"    {_literal(name)}: {_literal(digest)}," for name, digest in expected.items())
    yield "}"
    yield 'written = {name: file["sha256"] for name, file in engine.manifest.files.items()}'
    yield "different = [name for name, digest in EXPECTED.items() if written.get(name) != digest]"
    yield "sys.exit(f\"not the same as before: {', '.join(different)}\" if different else None)"


def _literal(value: Any) -> str:
    """Plain data as Python writes it: nothing that a manifest holds is ever code in the script."""
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(inner) for inner in value) + "]"
    raise InputError(f"the engine's {MANIFEST} holds a {type(value).__name__}: altered, build the engine again")


def _one_line(text: str) -> str:
    """For comments and docstrings: no line ends, no quotes, nothing that could end either."""
    return "".join(c if c.isprintable() and c not in '"\\' else " " for c in text)
