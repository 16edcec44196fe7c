"""The engine folder: a manifest, the compiled parts, the tokenizer. Whole, hashed, versioned, without pickle."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.checkpoint import ASSETS
from llmlab.config import ModelConfig
from llmlab.errors import CheckpointError, EngineError
from llmlab.files import plain_name, read_json, sha256, write_json

if TYPE_CHECKING:
    from llmlab.runtime.batch import Backend

ENGINE_FORMAT = 1
MANIFEST, MODEL, WEIGHTS = "manifest.json", "model.onnx", "weights.bin"
TARGETS = ("onnxruntime",)


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens that an engine was built for."""

    max_seq_len: int
    max_tokens_per_step: int


def slot_capacity(limits: Limits) -> int:
    """Tokens of a slot, rounded up so that its keys and values in any layer start and end at a memory page."""
    return -(-(limits.max_seq_len + limits.max_tokens_per_step) // 1024) * 1024


@dataclass(frozen=True)
class KVLayout:
    """How the KV cache lies: `slots` (one block a sequence), element type, and (kv_heads, head_dim) of each layer."""

    layout: str
    dtype: str
    capacity: int
    """Tokens a slot has room for: the longest sequence and the padding of one step behind it."""
    layers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    target: str
    precision: str
    model: Mapping[str, Any]
    """The model's config.json."""
    kv: KVLayout
    limits: Limits
    eos_token_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The model's generation_config.json."""
    passes: tuple[tuple[str, int], ...] = ()
    """Passes that made the graph, in order, with the number of rewrites of each."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Size in bytes and sha256 of every other file."""

    @property
    def max_seq_len(self) -> int:
        return self.limits.max_seq_len

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.model, where=MANIFEST)

    def to_dict(self) -> dict[str, Any]:
        from llmlab import __version__

        return {"format": ENGINE_FORMAT, "llmlab": __version__, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write manifest.json for the files that lie in `folder`."""
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, self.to_dict() | {"files": files})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `folder/manifest.json`. Raises EngineError."""
        path = folder / MANIFEST
        if not path.is_file():
            raise EngineError(f"{folder}: no {MANIFEST} there; expected an engine folder that llmlab built")
        data = read_json(path, EngineError)
        version = data.get("format") if isinstance(data, dict) else None
        if version != ENGINE_FORMAT:
            made = f", made by llmlab {data.get('llmlab')}" if isinstance(data, dict) and data.get("llmlab") else ""
            raise EngineError(
                f"{folder}: engine format {version!r}{made}, this llmlab reads {ENGINE_FORMAT}: build it again, or update llmlab"
            )
        try:
            manifest = cls(
                target=str(data["target"]),
                precision=str(data["precision"]),
                model=dict(data["model"]),
                kv=KVLayout(
                    data["kv"]["layout"],
                    data["kv"]["dtype"],
                    _count(data["kv"]["capacity"]),
                    tuple((_count(h), _count(d)) for h, d in data["kv"]["layers"]),
                ),
                limits=Limits(_count(data["limits"]["max_seq_len"]), _count(data["limits"]["max_tokens_per_step"])),
                eos_token_ids=tuple(_count(i, 0) for i in data["eos_token_ids"]),
                generation=dict(data["generation"]),
                passes=tuple((str(n), int(c)) for n, c in data["passes"]),
                files={
                    str(n): {"size": _count(f["size"], 0), "sha256": str(f["sha256"])} for n, f in data["files"].items()
                },
            )
            _ = manifest.config
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as problem:
            raise EngineError(
                f"{path}: a field is missing or malformed ({problem}): altered, build the engine again"
            ) from problem
        return manifest


def _count(value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 62:
        raise ValueError(f"{value!r} is no size")
    return value


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
        for name in (MODEL, WEIGHTS):
            if name not in manifest.files:
                raise EngineError(f"{folder / MANIFEST}: lists no {name}: altered, build the engine again")
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        present = {n for n in ASSETS if (folder / n).exists()}
        if foreign := present - set(manifest.files):
            raise EngineError(f"{folder / min(foreign)}: not listed in {MANIFEST}: added after the build, remove it")
        return cls(folder, manifest)

    def backend(self, *, threads: int | None = None, max_num_seqs: int) -> Backend:
        """What executes this engine's steps: `threads` CPU threads (default: physical cores), `max_num_seqs` slots."""
        from llmlab.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(self, threads=threads, num_slots=max_num_seqs)

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
        facts = {
            "folder": self.path,
            "model": f"{m.config.model_type}, {m.config.num_layers} layers, vocabulary {m.config.vocab_size:,}",
            "target": f"{m.target}, {m.precision}",
            "size": f"{self.size / 1e6:.1f} MB in {len(m.files)} files",
            "limits": f"{m.limits.max_seq_len:,} tokens a sequence, {m.limits.max_tokens_per_step:,} new tokens a step",
            "KV cache": f"{m.kv.layout}, {m.kv.dtype}, {sum(2 * h * d for h, d in m.kv.layers):,} numbers a token",
        }
        rows = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>{html.escape(str(v))}</td></tr>"
            for k, v in facts.items()
        )
        return {"text/plain": repr(self), "text/html": f"<table>{rows}</table>"}


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
