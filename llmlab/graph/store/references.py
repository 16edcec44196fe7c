"""Weights that a saved graph leaves where they are: which files, and whether they are still the same."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmlab.errors import GraphError

_MOST_FILES = 10_000


class References:
    """The files that arrays are mapped from, each under the name that a protobuf gives it."""

    def __init__(self, leave_out: Path) -> None:
        """Files in the folder `leave_out`, which may be about to be replaced, are not referred to."""
        self._leave_out = leave_out.resolve()
        self._names: dict[Path, str] = {}

    def place(self, values: object) -> tuple[str, int] | None:
        """Name and offset of the file that `values` are a whole map of, None where they aren't one, or the file is gone."""
        if not isinstance(values, np.memmap) or not isinstance(values.base, mmap.mmap) or not values.filename:
            return None
        path = Path(values.filename).resolve()
        if not path.is_file() or path.parent == self._leave_out:
            return None
        return self._names.setdefault(path, f"reference/{len(self._names)}"), int(values.offset)

    def to_list(self) -> list[dict[str, Any]]:
        """What `open_references` reads."""
        return [{"name": name, "path": str(path), **_state(path)} for path, name in self._names.items()]


def open_references(entries: Any, allowed: Path | None, where: Path) -> dict[str, BinaryIO]:
    """The files in `entries`, opened, by their names. None is looked at unless it lies in the folder `allowed`.

    A graph folder may come from a stranger, so that it names a file gives no right to read it. Raises GraphError where
    the folder wasn't allowed, and where a file is gone or was changed.
    """
    if not isinstance(entries, list) or len(entries) > _MOST_FILES:
        raise GraphError(f"{where}: its list of files is malformed: altered, export it again")
    files: dict[str, BinaryIO] = {}
    for entry in entries:
        try:
            name, path = entry["name"], Path(entry["path"])
            expected = {key: entry[key] for key in ("size", "mtime_ns")}
        except (TypeError, KeyError) as problem:
            raise GraphError(f"{where}: its list of files is malformed: altered, export it again") from problem
        if allowed is None:
            raise GraphError(
                f"{where}: refers to weights in {str(path.parent)!r}; name that folder if you trust it (Graph.load(weights_from=…), --weights-from)"
            )
        try:
            path = path.resolve()
            if not path.is_relative_to(allowed.expanduser().resolve()):
                raise GraphError(
                    f"{where}: refers to {str(path)!r}, which is not in {str(allowed)!r}: altered, or moved"
                )
            if not path.is_file():  # a pipe would keep `open` waiting
                raise OSError("not a regular file")
            file = path.open("rb")
        except (OSError, ValueError) as problem:
            raise GraphError(f"{str(path)!r}: the graph's weights are no longer there: export it again") from problem
        if _state(file.fileno()) != expected:
            file.close()
            raise GraphError(f"{str(path)!r}: changed since the graph was saved: export it again")
        files[str(name)] = file
    return files


def _state(file: Path | int) -> dict[str, int]:
    info = os.stat(file)  # noqa: PTH116 - a Path or an open file
    return {"size": info.st_size, "mtime_ns": info.st_mtime_ns}
