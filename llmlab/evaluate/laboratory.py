"""One graph, quantized in many ways, each built and measured against the graph as it is; what was measured once is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.build import build
from llmlab.errors import InputError
from llmlab.evaluate.accuracy import accuracy
from llmlab.evaluate.metrics import Estimate
from llmlab.evaluate.reference import Reference, read
from llmlab.evaluate.samples import Data
from llmlab.graph.graph import Graph
from llmlab.quant.data import calibration_data, data_key, default_source, tokenizer_of
from llmlab.quant.quantize import quantize
from llmlab.quant.recipe import Recipe
from llmlab.runtime.engine import Engine

_FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """An engine of the quantized graph against one of the graph as it is."""

    kl: Estimate
    """In nats a token."""
    top1: Estimate
    size_bytes: int
    """Of the engine folder's files."""

    def to_dict(self) -> dict[str, Any]:
        return {"kl": self.kl.to_dict(), "top1": self.top1.to_dict(), "size_bytes": self.size_bytes}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measured:
        return cls(Estimate(**data["kl"]), Estimate(**data["top1"]), int(data["size_bytes"]))


class Laboratory:
    """Builds and measures a serving graph under recipes, on ONNX Runtime.

    data, samples, length, seed, threads: as for `llmlab.evaluate`. calibration: as for `llmlab.quantize`; read once.
    cache: the folder in which measurements are kept (default: llmlab's in the user's cache folder), by a hash of all that
    they depend on: what was measured before an interruption isn't measured again.
    """

    def __init__(
        self,
        graph: Graph,
        data: Data | None,
        *,
        calibration: Any = None,
        samples: int = 64,
        length: int = 256,
        seed: int = 0,
        threads: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        if not isinstance(graph, Graph) or graph.kind != "serving":
            raise InputError("expected a serving graph: pass what llmlab.optimize returned")
        self.graph = graph
        self._seed, self._threads = seed, threads
        self._data: tuple[Data, int, int] = ("tinychat" if data is None else data, samples, length)
        self._calibration = calibration
        self._shown: Sequence[Any] | None = None
        self._reference: Reference | None = None
        self._cache = _cache_folder() if cache is None else Path(cache).expanduser()
        self._stack = contextlib.ExitStack()
        try:
            folder = tempfile.TemporaryDirectory(prefix="llmlab-laboratory-")
            self._folder = Path(self._stack.enter_context(folder))
            self.wide = build(graph, self._folder / "wide")
            self.samples = read(self.wide, *self._data, seed)
        except BaseException:
            self.close()
            raise
        files = {name: entry["sha256"] for name, entry in self.wide.manifest.files.items()}
        given = data_key([s.ids for s in self.samples]), [s.first for s in self.samples]
        self._fixed = {"format": _FORMAT, **_versions(), "model": files, "data": given, "seed": seed}

    def measure(self, recipe: Recipe) -> Measured:
        """What an engine of the graph under `recipe` is like. Raises what `quantize`, `build` and running the engine raise."""
        calibration = self._calibrated() if recipe.needs_calibration else None
        about = {key: value for key, value in recipe.to_dict().items() if key != "name"}
        key = self._key({"recipe": about, "calibration": None if calibration is None else data_key(calibration)})
        if (known := self._read(key)) is not None:
            return known
        if self._reference is None:
            self._reference = self._stack.enter_context(
                Reference(
                    self.wide,
                    self._data[0],
                    samples=self._data[1],
                    length=self._data[2],
                    seed=self._seed,
                    threads=self._threads,
                    answers=False,
                    progress=False,
                )
            )
        with tempfile.TemporaryDirectory(dir=self._folder) as place:
            quantized = quantize(self.graph, recipe, calibration, seed=self._seed)
            engine = build(quantized, Path(place) / "engine")
            found = self._held(engine, self._reference)
        self._write(key, found)
        return found

    @property
    def nothing(self) -> Measured:
        """The graph as it is, held against itself."""
        count = len(self.samples)
        return Measured(Estimate(0.0, 0.0, 0.0, count), Estimate(1.0, 1.0, 1.0, count), self.wide.size)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _held(self, engine: Engine, reference: Reference) -> Measured:
        found = accuracy(engine, reference.samples, reference, seed=self._seed, threads=self._threads, progress=False)
        assert found.kl is not None and found.top1 is not None
        return Measured(found.kl, found.top1, engine.size)

    def _calibrated(self) -> Sequence[Any]:
        if self._shown is None:
            source = default_source(self.graph) if self._calibration is None else self._calibration
            tokenizer = tokenizer_of(self.graph) if "tokenizer.json" in self.graph.assets else None
            self._shown = calibration_data(source, tokenizer, seed=self._seed)
        return self._shown

    def _key(self, about: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(self._fixed | about, sort_keys=True).encode()).hexdigest()

    def _read(self, key: str) -> Measured | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not there, or half of it: measured again
            return Measured.from_dict(json.loads((self._cache / f"{key}.json").read_text(encoding="utf-8")))
        return None

    def _write(self, key: str, found: Measured) -> None:
        """Whole or not at all; a folder that can't be written to costs time later, and nothing else."""
        with contextlib.suppress(OSError):
            self._cache.mkdir(parents=True, exist_ok=True)
            part = self._cache / f"{key}.{os.getpid()}.partial"
            part.write_text(json.dumps(found.to_dict()), encoding="utf-8")
            part.replace(self._cache / f"{key}.json")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmlab" / "measured"


def _versions() -> dict[str, str]:
    import onnxruntime

    from llmlab import __version__

    return {"llmlab": __version__, "onnxruntime": onnxruntime.__version__}
