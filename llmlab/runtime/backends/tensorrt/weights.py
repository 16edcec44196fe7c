"""The engine's weights file on the GPU: checked against the program, then copied while the next piece is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmlab.checkpoint import StoredTensor, read_safetensors
from llmlab.cuda import DeviceBuffer, Event, PinnedArray, Stream, copy_async
from llmlab.errors import CheckpointError, EngineError
from llmlab.files import open_regular
from llmlab.progress import byte_bar
from llmlab.runtime.backends.tensorrt.memory import aligned
from llmlab.runtime.manifest import TENSORS, Manifest
from llmlab.runtime.program import Program

_PIECE = 64 << 20  # bytes that are read while the ones before are copied


def find_weights(folder: Path, program: Program, manifest: Manifest) -> Mapping[str, StoredTensor]:
    """Where each of the program's weights lies. Raises EngineError for a file that isn't the program's."""
    if not program.weights:
        return {}
    path = folder / TENSORS
    if TENSORS not in manifest.files:
        raise EngineError(f"{path}: not listed in the manifest: altered, build the engine again")
    try:
        stored = read_safetensors(path)
    except CheckpointError as problem:
        raise EngineError(f"{problem}, or build the engine again") from problem
    if odd := set(stored) ^ set(program.weights):
        raise EngineError(f"{path}: {min(odd)!r} is not in both it and the program: altered, build the engine again")
    for name, spec in program.weights.items():
        found = stored[name]
        if (found.dtype.name, found.shape) != (spec.dtype, spec.shape):
            raise EngineError(
                f"{path}: {name!r} is {found.dtype.name} {list(found.shape)}, the program says {spec.dtype} {list(spec.shape)}: "
                "altered, build the engine again"
            )
    return stored


@dataclass(frozen=True)
class Weights:
    """All weights in one block of GPU memory, each at a multiple of 256 bytes."""

    buffer: DeviceBuffer
    addresses: Mapping[str, int]

    @classmethod
    def load(cls, stored: Mapping[str, StoredTensor], stream: Stream) -> Weights:
        """Copy them to the GPU, and wait for it. Raises EngineError where the memory isn't there, or the file ends early."""
        sizes = {name: tensor.end - tensor.offset for name, tensor in stored.items()}
        buffer = DeviceBuffer(sum(map(aligned, sizes.values())), "the weights")
        try:
            addresses, at = {}, buffer.pointer
            for name, size in sizes.items():
                addresses[name], at = at, at + aligned(size)
            _copy(stored, addresses, stream)
        except BaseException:
            stream.synchronize()
            buffer.free()
            raise
        return cls(buffer, addresses)


def _copy(stored: Mapping[str, StoredTensor], addresses: Mapping[str, int], stream: Stream) -> None:
    if not stored:
        return
    sizes = {name: tensor.end - tensor.offset for name, tensor in stored.items()}
    piece = min(_PIECE, max(sizes.values()))
    halves = [(PinnedArray(piece, np.uint8), Event()) for _ in range(2)]
    for _, done in halves:
        done.record(stream)
    turn = 0
    (path,) = {tensor.path for tensor in stored.values()}
    with open_regular(path) as file, byte_bar(sum(sizes.values()), "weights") as advance:
        for name, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
            file.seek(tensor.offset)
            for begin in range(0, sizes[name], piece):
                size = min(piece, sizes[name] - begin)
                host, done = halves[turn]
                turn = 1 - turn
                done.synchronize()
                if file.readinto(host.array[:size].data) != size:  # type: ignore[attr-defined]
                    raise EngineError(f"{path}: ends inside {name!r}: truncated, build the engine again")
                copy_async(addresses[name] + begin, host.pointer, size, stream)
                done.record(stream)
                advance(size)
    stream.synchronize()
