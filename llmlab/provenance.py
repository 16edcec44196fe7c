"""The public calls that made a graph or an engine, as plain data: what `llmlab script` writes a script from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = ("export", "optimize", "convert", "quantize", "build")


@dataclass(frozen=True)
class Step:
    """One call of a public function on the way to an engine."""

    call: str
    """One of CALLS."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What was given by name, as plain data; what was left at its default isn't there."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Arguments that no text holds, such as a torch module, by name, with what they were."""
    notes: tuple[str, ...] = ()
    """What else the result depends on, a line each."""

    def to_dict(self) -> dict[str, Any]:
        found = {"call": self.call, "arguments": dict(self.arguments), "missing": dict(self.missing)}
        return {**found, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Step:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        if data["call"] not in CALLS:
            raise ValueError(f"no step is {data['call']!r}")
        names = [*data["arguments"], *data["missing"]]
        if not all(isinstance(name, str) and name.isidentifier() for name in names):
            raise ValueError("an argument has no name")
        missing = {name: str(what) for name, what in data["missing"].items()}
        return cls(data["call"], dict(data["arguments"]), missing, tuple(str(note) for note in data["notes"]))


def step(call: str, given: Mapping[str, Any], defaults: Mapping[str, Any], *notes: str) -> Step:
    """The record of a call. What in `given` is neither plain data nor a path is told of by its type and contents' hash."""
    arguments, missing = {}, {}
    for name, value in given.items():
        if name in defaults and _same(value, defaults[name]):
            continue
        try:
            arguments[name] = plain_data(value)
        except TypeError:
            missing[name] = described(value)
    return Step(call, arguments, missing, tuple(note for note in notes if note))


def plain_data(value: Any) -> Any:
    """The same as JSON has it, paths as text. Raises TypeError for what JSON doesn't have."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_data(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} is no plain data")


def described(value: Any) -> str:
    """In a few words, what an argument was: its type, and for data how much of it and its sha256."""
    try:
        body = json.dumps(plain_data(value), sort_keys=True).encode()
    except TypeError:
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of {len(value)}, sha256 {hashlib.sha256(body).hexdigest()} as JSON"


def _same(value: Any, default: Any) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, (bool, int, str)) and value == default
    )
