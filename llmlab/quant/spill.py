"""Files of a walk: what layers hand on until it is read, and what was found, so that an interrupted walk goes on where it was."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmlab.errors import InputError
from llmlab.graph.cut import structural_key
from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import array, constants
from llmlab.quant.data import Ids, data_key

FORMAT = 2
Arrays = Mapping[str, np.ndarray]


class Spill:
    """A folder with a file for what each piece made of each batch, and one for each result.

    Each file is written under another name first, so that it is there whole or not at all. keep_results: False where the folder
    is one that goes with the walk.
    """

    def __init__(self, folder: Path, readers: Mapping[str, int], keep_results: bool) -> None:
        self._folder = folder
        self._readers = readers
        self._keep = keep_results

    @classmethod
    @contextmanager
    def open(cls, cache: Path | None, key: str, readers: Mapping[str, int]) -> Iterator[Spill]:
        """cache: the folder of the user's, where `key` has a folder of its own; None: one that is removed. readers: by
        tensor, the last piece that reads it."""
        if cache is None:
            with tempfile.TemporaryDirectory(prefix="llmlab-calibration-") as name:
                yield cls(Path(name), readers, False)
            return
        folder = Path(cache).expanduser() / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(
                f"{folder}: can't be written ({problem.strerror or problem}): choose another cache"
            ) from problem
        yield cls(folder, readers, True)

    def done(self, place: int) -> bool:
        """Whether an earlier run finished this piece."""
        return (self._folder / f"piece-{place}.done").is_file()

    def result(self, name: str) -> dict[str, np.ndarray] | None:
        """What an earlier run found for a group."""
        path = self._result(name)
        return _read(path, None) if path.is_file() else None

    def keep(self, name: str, found: Arrays) -> None:
        if self._keep:
            self._write(self._result(name), found)

    def write(self, place: int, batch: int, made: Arrays) -> None:
        """What a piece made of a batch, as far as another piece reads it."""
        read = {name: a for name, a in made.items() if self._readers.get(name, -1) > place}
        self._write(self._made(place, batch), read)

    def read(self, batch: int, names: Sequence[str], homes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """These tensors of a batch; homes: the piece that made each."""
        found: dict[str, np.ndarray] = {}
        for place in {homes[name] for name in names}:
            found |= _read(self._made(place, batch), [name for name in names if homes[name] == place])
        return found

    def finish(self, place: int, homes: Mapping[str, int]) -> None:
        """Note that a piece is done, and remove what nothing reads any more; homes: the piece that makes each tensor."""
        if self._keep:
            (self._folder / f"piece-{place}.done").touch()
        read = {homes[name] for name, last in self._readers.items() if last > place}
        for maker in {homes[name] for name, last in self._readers.items() if last == place} - read:
            for file in self._folder.glob(f"piece-{maker}-batch-*.safetensors"):
                file.unlink()

    def _result(self, name: str) -> Path:
        return self._folder / f"result-{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"

    def _made(self, place: int, batch: int) -> Path:
        return self._folder / f"piece-{place}-batch-{batch}.safetensors"

    def _write(self, path: Path, arrays: Arrays) -> None:
        partial = path.with_suffix(".partial")
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, partial)
        partial.replace(path)


def walk_key(graph: Graph, data: Sequence[Ids], settings: str) -> str:
    """A hash of all that a walk's results depend on; the weights are read once for it."""
    digest = hashlib.sha256(f"{FORMAT}|{settings}|{structural_key(graph.surgeon)}|{data_key(data)}".encode())
    for constant in constants(graph.surgeon):
        digest.update(f"|{constant.name}|".encode())
        digest.update(np.ascontiguousarray(array(constant)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _read(path: Path, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (OSError, SafetensorError) as problem:
        raise InputError(f"{path}: damaged ({problem}): remove {path.parent} and run again") from problem
