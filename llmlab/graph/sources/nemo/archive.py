"""The files inside a `.nemo` archive, read where they lie: a plain tar is never unpacked, a gzipped one into one temporary file."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llmlab.checkpoint import StoredTensor
from llmlab.errors import CheckpointError, require

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
_MOST_FILES = 10_000
_SMALL = 64 << 20  # bytes; what is read whole
_INFLATION = 50  # times; weights hardly shrink, so what grows more is no archive of weights
_CHUNK = 16 << 20
_DTYPES = {n: np.dtype(getattr(ml_dtypes, n, n)) for n in ("float32", "bfloat16", "float16", "float64")}
_RANK = re.compile(r"(?:tp_rank_(\d{2,3})_pp_rank_(\d{3})|mp_rank_(\d{2,3}))/" + re.escape(WEIGHTS))


class _File(NamedTuple):
    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Rank:
    """The weights of one tensor- and pipeline-parallel rank, where they lie, by their own names."""

    tensor: int
    pipeline: int
    weights: Mapping[str, StoredTensor]


class Archive:
    """A `.nemo` file or the folder it was unpacked into. Raises CheckpointError, in one line, for what is not whole or not safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unzipped: Path | None = None
        try:
            self._files = _in_folder(path) if path.is_dir() else _in_tar(path, self._plain(path))
        except BaseException as problem:
            self.close()
            if isinstance(problem, (tarfile.TarError, OSError, EOFError, zlib.error)):
                why = " ".join(str(problem).split())
                raise CheckpointError(
                    f"{path}: no whole tar archive ({why}): truncated or not a .nemo file"
                ) from problem
            raise

    def close(self) -> None:
        """Remove the temporary file, if there is one; what was mapped stays readable."""
        if self._unzipped is not None:
            self._unzipped.unlink(missing_ok=True)

    def _plain(self, path: Path) -> Path:
        """`path` itself, or the tar inside it where it is gzipped."""
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                return path
        most = max(_SMALL, _INFLATION * path.stat().st_size)
        handle, name = tempfile.mkstemp(prefix="llmlab-", suffix=".tar")
        self._unzipped = Path(name)
        with os.fdopen(handle, "wb") as out, gzip.open(path) as packed:
            while chunk := packed.read(_CHUNK):
                if out.tell() + len(chunk) > most:
                    raise CheckpointError(
                        f"{path}: grows beyond {most} bytes when it is unzipped: no archive of weights"
                    )
                out.write(chunk)
        return self._unzipped

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str, limit: int = _SMALL) -> bytes:
        """The bytes of a small file."""
        if name not in self._files:
            raise CheckpointError(f"{self.path}: no {name} in it; expected a NeMo archive of a GPT model")
        file = self._files[name]
        if file.size > limit:
            raise CheckpointError(
                f"{self.path}: {name} has {file.size} bytes, more than the {limit} that such a file may have"
            )
        with file.path.open("rb") as source:
            source.seek(file.offset)
            return source.read(file.size)

    def ranks(self) -> list[Rank]:
        """The weights of every rank, by pipeline rank, then tensor rank; nothing is loaded."""
        found = {}
        for name, file in self._files.items():
            if name == WEIGHTS:
                found[0, 0] = (name, file)
            elif match := _RANK.fullmatch(name):
                tensor, pipeline, alone = match.groups()
                found[int(pipeline or 0), int(alone or tensor)] = (name, file)
        stages, width = 1 + max((p for p, _ in found), default=-1), 1 + max((t for _, t in found), default=-1)
        if not found:
            kind = "a distributed checkpoint (model_weights/)" if self._holds("model_weights/") else "no weights"
            raise CheckpointError(
                f"{self.path}: {kind} where {WEIGHTS} was expected; save it from NeMo with dist_ckpt_format off, or convert it there"
            )
        if len(found) != stages * width:
            raise CheckpointError(
                f"{self.path}: {len(found)} files of weights for {width} tensor × {stages} pipeline ranks: incomplete"
            )
        return [Rank(t, p, _state_dict(f"{self.path}: {name}", file)) for (p, t), (name, file) in sorted(found.items())]

    def _holds(self, folder: str) -> bool:
        return any(name.startswith(folder) for name in self._files)


def _in_folder(folder: Path) -> dict[str, _File]:
    files: dict[str, _File] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link; expected plain files inside the folder")
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _File(path, 0, path.stat().st_size)
        if len(files) > _MOST_FILES:
            raise CheckpointError(f"{folder}: more than {_MOST_FILES} files: no unpacked NeMo archive")
    return files


def _in_tar(path: Path, tar: Path) -> dict[str, _File]:
    files: dict[str, _File] = {}
    end = tar.stat().st_size
    with tarfile.open(tar, "r:") as archive:
        for count, member in enumerate(archive):
            if count >= _MOST_FILES:
                raise CheckpointError(f"{path}: more than {_MOST_FILES} files in it: no NeMo archive")
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise CheckpointError(f"{path}: names the file {member.name!r}, expected one inside the archive")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise CheckpointError(f"{path}: {member.name!r} is a link or a device, expected plain files")
            if member.size < 0 or member.offset_data + member.size > end:
                raise CheckpointError(f"{path}: {member.name!r} ends beyond the archive: truncated, fetch it again")
            files[name.as_posix()] = _File(tar, member.offset_data, member.size)
    return files


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: _File) -> None:
        self._source = file.path.open("rb")
        self._begin, self._size, self._at = file.offset, file.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._source.seek(self._begin + self._at)
        data = self._source.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()


def _state_dict(where: str, file: _File) -> dict[str, StoredTensor]:
    """Where the tensors of a torch file lie. torch unpickles it with weights_only, and over fake tensors: no storage is read."""
    torch = require("torch", "export")
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with _Window(file) as window:
            with zipfile.ZipFile(window) as container:
                stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in container.infolist())
            window.seek(0)
            # BytesIO: the `_extra_state` of TransformerEngine's modules, which holds no weights.
            with FakeTensorMode(), torch.serialization.safe_globals([io.BytesIO]):
                state = torch.load(window, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as problem:
        raise CheckpointError(
            f"{where}: not a torch file of the format since 1.6: truncated, or save it again"
        ) from problem
    except Exception as problem:  # torch raises whatever the pickle makes of it
        reason = next(iter(re.sub(r"\s+", " ", str(problem)).split(". ")), "") or type(problem).__name__
        raise CheckpointError(f"{where}: torch refuses to load it with weights_only ({reason[:200]})") from problem
    if not stored or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{where}: {'not a state dict' if stored else 'compressed'}; expected what torch.save writes"
        )
    return {
        str(name): _place(f"{where}: {name!r}", tensor, file)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not str(name).endswith("_extra_state")
    }


def _place(where: str, tensor: Any, file: _File) -> StoredTensor:
    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{where} has type {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
    if not tensor.is_contiguous() or tensor.is_neg():
        raise CheckpointError(f"{where} is stored as a view with strides {list(tensor.stride())}; save it contiguous")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    begin = -1 if offset is None else offset + tensor.storage_offset() * dtype.itemsize
    if begin < 0 or begin + tensor.numel() * dtype.itemsize > file.size:
        raise CheckpointError(f"{where} ends beyond its file: truncated or altered")
    return StoredTensor(file.path, dtype, tuple(int(d) for d in tensor.shape), file.offset + begin)
