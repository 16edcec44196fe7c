"""ONNX Runtime's own profile of a session, run by run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.errors import EngineError

_SUFFIX = "_kernel_time"
_BITS = {
    "float": 32,
    "double": 64,
    "float16": 16,
    "bfloat16": 16,
    "int64": 64,
    "uint64": 64,
    "int32": 32,
    "uint32": 32,
    "int4": 4,
    "uint4": 4,
}
Shape = tuple[str, tuple[int, ...]]
"""(element type in ONNX Runtime's words, shape)."""


@dataclass(frozen=True)
class Event:
    """One kernel in one run."""

    name: str
    op: str
    seconds: float
    inputs: tuple[Shape, ...]
    """Those that are given, weights that the kernel has packed left out."""
    outputs: tuple[Shape, ...]


@dataclass(frozen=True)
class Run:
    """One run of the session."""

    seconds: float
    events: tuple[Event, ...]


def read_profile(path: Path) -> list[Run]:
    """The runs of a session, oldest first. Raises EngineError for a file that isn't a profile."""
    try:
        entries = json.loads(path.read_text("utf-8"))
        whole = [e for e in entries if e.get("cat") == "Session" and e["name"] == "model_run"]
        whole.sort(key=lambda e: e["ts"])
        found: list[list[Event]] = [[] for _ in whole]
        nodes = sorted((e for e in entries if _is_kernel(e)), key=lambda e: e["ts"])
        at = 0
        for entry in nodes:
            while at < len(whole) and entry["ts"] > whole[at]["ts"] + whole[at]["dur"]:
                at += 1
            if at < len(whole) and entry["ts"] >= whole[at]["ts"]:
                found[at].append(_event(entry))
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as problem:
        raise EngineError(f"{path}: not a profile of ONNX Runtime ({problem})") from problem
    return [Run(e["dur"] * 1e-6, tuple(events)) for e, events in zip(whole, found, strict=True)]


def byte_size(shape: Shape) -> int:
    """Bytes of a tensor; types that aren't known here have one a number."""
    count = 1
    for size in shape[1]:
        count *= size
    return count * _BITS.get(shape[0], 8) // 8


def _is_kernel(entry: dict[str, Any]) -> bool:
    return entry.get("cat") == "Node" and str(entry.get("name", "")).endswith(_SUFFIX)


def _event(entry: dict[str, Any]) -> Event:
    given = entry["args"]
    inputs, outputs = (_shapes(given.get(f"{side}_type_shape", ())) for side in ("input", "output"))
    return Event(entry["name"].removesuffix(_SUFFIX), given["op_name"], entry["dur"] * 1e-6, inputs, outputs)


def _shapes(given: list[dict[str, list[int]]]) -> tuple[Shape, ...]:
    return tuple((dtype, tuple(shape)) for entry in given for dtype, shape in entry.items())
