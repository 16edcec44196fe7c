"""The engine folder: a manifest, the compiled parts, the tokenizer. Whole, hashed, versioned, without pickle."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmlab.checkpoint import ASSETS
from llmlab.errors import EngineError, InputError
from llmlab.files import plain_name, sha256
from llmlab.runtime.batch import Backend
from llmlab.runtime.manifest import (
    KERNELS,
    MANIFEST,
    MODEL,
    PREFILL_MODEL,
    PREFILL_WEIGHTS,
    PROGRAM,
    TABLES,
    WEIGHTS,
    Manifest,
)

TARGETS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": (MODEL, WEIGHTS),
    "tensorrt": (PROGRAM, TABLES, KERNELS),
    "tensorrt-rtx": (PROGRAM, TABLES, KERNELS),
}
"""What this llmlab can run, and the files that an engine for it must have."""


class Engine:
    """An engine folder that was opened and checked. `llmlab.LLM(engine)` runs it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def load(cls, path: str | Path) -> Engine:
        """Open an engine folder: version first, then the size and hash of every file. Raises EngineError."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise EngineError(f"{folder}: no such folder; `llmlab build` makes an engine")
        manifest = Manifest.read(folder)
        if manifest.target not in TARGETS:
            raise EngineError(f"{folder}: built for {manifest.target!r}, this llmlab runs {', '.join(TARGETS)}")
        if (manifest.compiled is None) != (manifest.target == "onnxruntime"):
            raise EngineError(f"{folder / MANIFEST}: doesn't say how it was compiled: altered, build the engine again")
        prefill = manifest.products is not None and manifest.products.prefill
        for name in (*TARGETS[manifest.target], *((PREFILL_MODEL, PREFILL_WEIGHTS) if prefill else ())):
            if name not in manifest.files:
                raise EngineError(f"{folder / MANIFEST}: lists no {name}: altered, build the engine again")
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        present = {n for n in ASSETS if (folder / n).exists()}
        if foreign := present - set(manifest.files):
            raise EngineError(f"{folder / min(foreign)}: not listed in {MANIFEST}: added after the build, remove it")
        return cls(folder, manifest)

    def backend(
        self,
        *,
        max_num_seqs: int,
        threads: int | None = None,
        kv_blocks: int | None = None,
        kv_memory_fraction: float | None = None,
    ) -> Backend:
        """What executes this engine's steps, for up to `max_num_seqs` sequences at a time.

        threads: CPU threads of an onnxruntime engine (default: physical cores), which has a slot for each sequence.
        kv_blocks, kv_memory_fraction: size of a TensorRT engine's KV pool, in blocks or as a share of the GPU memory that
        is free beside the rest. See `llmlab.LLM`.
        Raises InputError for an argument that this engine doesn't take, EngineError where it can't run here.
        """
        if self.manifest.target == "onnxruntime":
            _refuse(self, "TensorRT", kv_blocks=kv_blocks, kv_memory_fraction=kv_memory_fraction)
            from llmlab.runtime.backends.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend(self.path, self.manifest, threads=threads, num_slots=max_num_seqs)
        _refuse(self, "onnxruntime", threads=threads)
        from llmlab.runtime.backends.tensorrt.open import open_backend

        return open_backend(
            self.path,
            self.manifest,
            max_num_seqs=max_num_seqs,
            kv_blocks=kv_blocks,
            kv_memory_fraction=kv_memory_fraction,
        )

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(int(entry["size"]) for entry in self.manifest.files.values())

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "size": self.size, **self.manifest.to_dict()}

    def __repr__(self) -> str:
        m = self.manifest
        return f"Engine({str(self.path)!r}, {m.config.model_type}, {m.target}, {m.precision}, {self.size / 1e6:.1f} MB, up to {m.max_seq_len} tokens)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        m = self.manifest
        facts: dict[str, Any] = {
            "folder": self.path,
            "model": f"{m.config.model_type}, {m.config.num_layers} layers, vocabulary {m.config.vocab_size:,}",
            "target": f"{m.target}, {m.precision}",
            "size": f"{self.size / 1e6:.1f} MB in {len(m.files)} files",
            "limits": f"{m.limits.max_seq_len:,} tokens a sequence, {m.limits.max_tokens_per_step:,} new tokens a step",
            "KV cache": str(m.kv),
        }
        if m.products is not None:
            facts["products"] = m.products
        if (c := m.compiled) is not None:
            gpus = ", ".join(f"{major}.{minor}" for major, minor in c.compute_capabilities)
            facts["compiled"] = (
                f"{c.library} for compute capability {gpus}, attention {c.hosting}, products by {c.products}"
            )
            facts["batch"] = f"up to {c.max_batch} sequences a step"
        rows = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>{html.escape(str(v))}</td></tr>"
            for k, v in facts.items()
        )
        return {"text/plain": repr(self), "text/html": f"<table>{rows}</table>"}


def _refuse(engine: Engine, others: str, **given: float | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} is for {others} engines, {engine.path} is built for {engine.manifest.target}")


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    path = folder / name
    if not plain_name(name) or path.is_symlink():
        raise EngineError(f"{folder / MANIFEST}: names the file {name!r}, expected one inside the folder")
    if not path.is_file():
        raise EngineError(f"{path}: missing; the engine is incomplete, build it again")
    if path.stat().st_size != entry["size"]:
        raise EngineError(
            f"{path}: {path.stat().st_size} bytes, the manifest says {entry['size']}: truncated or altered, build it again"
        )
    if sha256(path) != entry["sha256"]:
        raise EngineError(f"{path}: its sha256 is not the manifest's: altered, build the engine again")
