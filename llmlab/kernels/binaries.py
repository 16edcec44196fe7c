"""Compiled kernels in an engine folder: `kernels.json` and the cubins that it names. Needs neither triton nor a GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.errors import EngineError
from llmlab.files import plain_name, read_bytes, read_json, write_json

INDEX = "kernels.json"
TYPES = ("ptr", "i64", "i32", "fp32")
_VERSION = 1
_JSON_LIMIT = 16 << 20  # bytes
_CUBIN_LIMIT = 16 << 20  # bytes; the largest are about 0.3 MB
_COUNT_LIMIT = 4096
_SHARED_LIMIT = 256 << 10  # bytes
_TUNING = frozenset({"TILE", "EARLY"})  # what differs between architectures and isn't seen by who launches


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    """Of the Triton function, and of the symbol in the cubin."""
    constants: Mapping[str, int | float | str]
    """What it was compiled for: the function's constants, and the types of the tensors it reads."""
    architecture: int
    """90 for sm_90."""
    parameters: tuple[tuple[str, str], ...]
    """Name and type (of `TYPES`) of each value that a launch gives, in order. Two null pointers of Triton's come last."""
    num_warps: int
    shared: int
    """Dynamic shared memory a block, bytes."""
    aligned: bool
    """Whether tensors and their strides have to be multiples of 16 (bytes, elements), so that loads are wide."""
    cubin: bytes

    @property
    def file(self) -> str:
        return f"{self.name}-{hashlib.sha256(self.cubin).hexdigest()[:16]}.sm{self.architecture}.cubin"


def _key(name: str, architecture: int, constants: Mapping[str, Any]) -> tuple[Any, ...]:
    return name, architecture, frozenset((k, v) for k, v in constants.items() if k not in _TUNING)


class KernelSet:
    """The kernels of one engine, for all GPUs that it was built for."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        self._by_key = {_key(k.name, k.architecture, k.constants): k for k in kernels}

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(self._by_key.values())

    @property
    def architectures(self) -> tuple[int, ...]:
        return tuple(sorted({kernel.architecture for kernel in self.kernels}))

    def __add__(self, other: KernelSet) -> KernelSet:
        return KernelSet(self.kernels + other.kernels)

    def find(
        self, name: str, constants: Mapping[str, int | float | str], compute_capability: tuple[int, int]
    ) -> Kernel:
        """The kernel for this GPU, or EngineError in one line.

        A cubin runs on its own architecture; of those before 9.0 also on later ones of the same major version.
        """
        major, minor = compute_capability
        lower = range(minor if major >= 9 else 0, minor + 1)
        fitting = [a for a in self.architectures if a // 10 == major and a % 10 in lower]
        if not fitting:
            built = ", ".join(f"sm_{a}" for a in self.architectures) or "none"
            raise EngineError(
                f"this engine has no kernels for this GPU (sm_{major}{minor}), only for {built}: build it again with sm_{major}{minor} among its compute capabilities"
            )
        if kernel := self._by_key.get(_key(name, fitting[-1], constants)):
            return kernel
        wanted = ", ".join(f"{k}={v}" for k, v in constants.items())
        raise EngineError(f"{INDEX} has no kernel {name} with {wanted}: build the engine again with this llmlab")

    def write(self, folder: Path) -> None:
        """Put the cubins and their index into `folder`."""
        records = []
        for kernel in self.kernels:
            (folder / kernel.file).write_bytes(kernel.cubin)
            record = {name: value for name, value in vars(kernel).items() if name != "cubin"}
            records.append({**record, "file": kernel.file, "sha256": hashlib.sha256(kernel.cubin).hexdigest()})
        write_json(folder / INDEX, {"version": _VERSION, "kernels": records})

    @classmethod
    def read(cls, folder: Path) -> KernelSet:
        """What `write` left there. EngineError in one line where a file is missing, altered, too large or of another version."""
        path = folder / INDEX
        index = read_json(path, EngineError, _JSON_LIMIT)
        if not isinstance(index, dict) or index.get("version") != _VERSION:
            raise EngineError(f"{path}: not an index of version {_VERSION}: build the engine again with this llmlab")
        records = index.get("kernels")
        if not isinstance(records, list) or len(records) > _COUNT_LIMIT:
            raise EngineError(f"{path}: expected a list of at most {_COUNT_LIMIT} kernels")
        return cls(_read_kernel(folder, record) for record in records)


def _read_kernel(folder: Path, record: Any) -> Kernel:
    if not isinstance(record, dict) or not isinstance(file := record.get("file"), str) or not plain_name(file):
        raise EngineError(f"{folder / INDEX}: a kernel has no plain file name: build the engine again")
    cubin = read_bytes(folder / file, EngineError, _CUBIN_LIMIT)
    if hashlib.sha256(cubin).hexdigest() != record.get("sha256"):
        raise EngineError(f"{folder / file} was altered after the build (its SHA-256 differs): build the engine again")
    try:
        kernel = Kernel(
            name=record["name"],
            constants=record["constants"],
            architecture=record["architecture"],
            parameters=tuple((name, kind) for name, kind in record["parameters"]),
            num_warps=record["num_warps"],
            shared=record["shared"],
            aligned=record["aligned"],
            cubin=cubin,
        )
        fits = (
            isinstance(kernel.name, str)
            and all(type(v) in (int, float, bool, str) for v in kernel.constants.values())
            and all(type(n) is int for n in (kernel.architecture, kernel.num_warps, kernel.shared))
            and all(isinstance(name, str) and kind in TYPES for name, kind in kernel.parameters)
            and kernel.num_warps in (1, 2, 4, 8, 16, 32)
            and 0 <= kernel.shared <= _SHARED_LIMIT
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise EngineError(f"{folder / INDEX}: what it says of {file} can't be used: build the engine again")
    return kernel
