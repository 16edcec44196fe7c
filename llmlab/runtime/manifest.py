"""What an engine folder's manifest.json says, and whether it can be believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmlab.config import ModelConfig
from llmlab.errors import CheckpointError, EngineError
from llmlab.files import read_json, sha256, write_json
from llmlab.kernels.kv_cache import BITS
from llmlab.provenance import Step

ENGINE_FORMAT = 1
MANIFEST = "manifest.json"
MODEL, WEIGHTS = "model.onnx", "weights.bin"  # onnxruntime
PREFILL_MODEL, PREFILL_WEIGHTS = "prefill.onnx", "prefill.bin"  # beside them, for steps of many tokens
PROGRAM, TABLES, KERNELS = "program.json", "tables.safetensors", "kernels.json"  # TensorRT, beside *.plan and *.cubin
TENSORS = "weights.safetensors"  # TensorRT, where products are kernels
LAYERS = "layers.json"  # TensorRT: how long each part took to build, and its layers as the build or the inspector listed them
ORIGINS = "origins.json"  # which nodes of the serving graph became which of the model that was compiled


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
    """How the KV cache lies: `slots` (one block a sequence) or `paged`, element type, and (kv_heads, channels of a head) of
    each layer."""

    layout: str
    dtype: str
    capacity: int
    """Tokens a block has room for. A slot holds the longest sequence and the padding of one step behind it."""
    layers: tuple[tuple[int, int], ...]
    rounding: str = ""
    """A narrower type that the numbers are rounded to, on a target that has no cache of that type; else empty."""

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all layers."""
        return sum(2 * heads * dim for heads, dim in self.layers) * BITS[self.dtype] // 8

    def __str__(self) -> str:
        rounded = f" rounded to {self.rounding}" if self.rounding else ""
        return f"{self.layout}, {self.dtype}{rounded}, {self.bytes_per_token:,} bytes a token"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVLayout:
        """What `asdict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        layers = tuple((_count(h), _count(d)) for h, d in data["layers"])
        rounding = str(data.get("rounding", ""))
        if (
            data["dtype"] not in BITS
            or rounding not in ("", *BITS)
            or any(d * BITS[data["dtype"]] % 8 for _, d in layers)
        ):
            raise ValueError(f"no KV cache is {data['dtype']}")
        return cls(str(data["layout"]), data["dtype"], _count(data["capacity"]), layers, rounding)


@dataclass(frozen=True)
class Compiled:
    """What the plans of a TensorRT engine fit."""

    library: str
    """The TensorRT that compiled them, such as "TensorRT 8.6.1": no other version reads them."""
    hosting: str
    """How attention runs: `plugin`, `piecewise` or `native`."""
    compute_capabilities: tuple[tuple[int, int], ...]
    """GPUs that they were built for."""
    max_batch: int
    """Sequences in a step, at most."""
    decode_buckets: tuple[int, ...] = ()
    """Batch sizes whose decode steps have kernels of their own."""
    products: str = "tensorrt"
    """What computes large linear layers: `kernels` of ours, or `tensorrt`."""


@dataclass(frozen=True)
class Products:
    """How an ONNX Runtime engine multiplies where weights alone are quantized."""

    accuracy_level: int
    """1: in float32; 4: with activations rounded to int8 by blocks."""
    prefill: str = ""
    """int8: steps of many tokens round activations by rows and the weights again by channels, in a model of their own."""

    def __str__(self) -> str:
        return f"accuracy level {self.accuracy_level}" + (f", prefill in {self.prefill}" if self.prefill else "")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Products | None:
        """What `asdict` gave; None where there are none. Raises KeyError, TypeError or ValueError for anything else."""
        if data is None:
            return None
        level, prefill = data["accuracy_level"], data["prefill"]
        if isinstance(level, bool) or level not in (1, 4) or prefill not in ("", "int8"):
            raise ValueError(f"no products of accuracy level {level!r} and prefill {prefill!r}")
        return cls(level, prefill)


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
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How it was quantized, as `llmlab.Recipe.parse` takes it; empty: not at all."""
    steps: tuple[Mapping[str, Any], ...] = ()
    """The public calls that made it, from the checkpoint on (`llmlab.provenance.Step`); `llmlab script` prints them."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Size in bytes and sha256 of every other file."""
    compiled: Compiled | None = None
    """None for onnxruntime."""
    products: Products | None = None
    """None for TensorRT, and where no weight alone is quantized."""

    @property
    def max_seq_len(self) -> int:
        return self.limits.max_seq_len

    @property
    def max_num_seqs(self) -> int:
        """Sequences in a step, at most: each has a token in it."""
        steps = self.limits.max_tokens_per_step
        return steps if self.compiled is None else min(steps, self.compiled.max_batch)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.model, where=MANIFEST)

    def to_dict(self) -> dict[str, Any]:
        from llmlab import __version__

        return {"format": ENGINE_FORMAT, "llmlab": __version__, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write manifest.json for the files that lie in `folder`."""
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
        body = self.to_dict() | {"files": files}
        write_json(folder / MANIFEST, body | {"sha256": digest(body)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `folder/manifest.json`. Raises EngineError."""
        path = folder / MANIFEST
        if not path.is_file():
            raise EngineError(f"{folder}: no {MANIFEST} there; expected an engine folder that llmlab built")
        data = read_json(path, EngineError)
        version = data.get("format") if isinstance(data, dict) else None
        if version != ENGINE_FORMAT or isinstance(version, bool):
            made = f", made by llmlab {data.get('llmlab')}" if isinstance(data, dict) and data.get("llmlab") else ""
            raise EngineError(
                f"{folder}: engine format {version!r}{made}, this llmlab reads {ENGINE_FORMAT}: build it again, or update llmlab"
            )
        if data.get("sha256") != digest(data):
            raise EngineError(f"{path}: its contents are not what was built: altered, build the engine again")
        try:
            manifest = cls(
                target=str(data["target"]),
                precision=str(data["precision"]),
                model=dict(data["model"]),
                kv=KVLayout.from_dict(data["kv"]),
                limits=Limits(_count(data["limits"]["max_seq_len"]), _count(data["limits"]["max_tokens_per_step"])),
                eos_token_ids=tuple(_count(i, 0) for i in data["eos_token_ids"]),
                generation=dict(data["generation"]),
                passes=tuple((str(n), int(c)) for n, c in data["passes"]),
                recipe=dict(data.get("recipe", {})),  # engines had none before there were recipes
                steps=tuple(Step.from_dict(entry).to_dict() for entry in data.get("steps", ())),
                files={
                    str(n): {"size": _count(f["size"], 0), "sha256": str(f["sha256"])} for n, f in data["files"].items()
                },
                compiled=_compiled(data.get("compiled")),
                products=Products.from_dict(data.get("products")),
            )
            _ = manifest.config
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, CheckpointError) as problem:
            raise EngineError(
                f"{path}: a field is missing or malformed ({problem}): altered, build the engine again"
            ) from problem
        return manifest


def _compiled(data: Mapping[str, Any] | None) -> Compiled | None:
    if data is None:  # an engine for onnxruntime, or one from before there were others
        return None
    return Compiled(
        library=str(data["library"]),
        hosting=str(data["hosting"]),
        compute_capabilities=tuple((_count(a), _count(b, 0)) for a, b in data["compute_capabilities"]),
        max_batch=_count(data["max_batch"]),
        decode_buckets=tuple(_count(b) for b in data["decode_buckets"]),
        products=str(data.get("products", "tensorrt")),  # engines from before there was a choice say nothing
    )


def digest(body: Mapping[str, Any]) -> str:
    """sha256 over a manifest's contents but its own `sha256`, however they are laid out."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _count(value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 62:
        raise ValueError(f"{value!r} is no size")
    return value
