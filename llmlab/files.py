"""Files from strangers read with limits, folders written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmlab.errors import InputError, LlmlabError

# What a file from elsewhere may ask for, at most. Beyond it: one line that names the file and the limit.
JSON_LIMIT = 64 << 20  # bytes of a JSON file; the largest tokenizer.json in use is about 35 MB
PROTO_LIMIT = (2 << 30) - 1  # bytes of an ONNX file, as protobuf itself has it; weights beside it may be larger
NAME_LIMIT = 1024  # characters of a name in an ONNX file
COUNT_LIMIT = 1_000_000  # nodes, and initializers, of an ONNX file once its functions are written out
DIM_LIMIT = (1 << 31) - 1  # a single dimension
RANK_LIMIT = 32  # dimensions of a tensor, what every numpy can map
WORK_LIMIT = 1 << 30  # bytes that the part of a graph which is executed (masks, tables, constants) may take
EXCERPT_LIMIT = 10_000  # nodes that it may have
TIME_LIMIT = 60.0  # seconds that it may run


def read_bytes(path: Path, error: type[LlmlabError], limit: int = JSON_LIMIT) -> bytes:
    """The file's bytes, or one line of `error` where it is missing, unreadable, no file or larger than `limit` bytes."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise error(f"{path}: {size} bytes, more than the {limit} that such a file may have")
            data = file.read(limit + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"{path}: can't be read ({getattr(problem, 'strerror', None) or problem})") from problem
    if len(data) > limit:  # it grew meanwhile, or has no size, as files in /proc
        raise error(f"{path}: more than the {limit} bytes that such a file may have")
    return data


def refuse_links(files: Iterable[Path], error: type[LlmlabError]) -> None:
    """One line of `error` where one of these files is a link: a stranger's, to any file that this user may read."""
    for file in files:
        if file.is_symlink():
            raise error(f"{file}: a link, expected the file itself: put it in the folder")


def open_regular(path: Path) -> BinaryIO:
    """The file open for reading. OSError where it is anything but a file: a pipe or a device would be waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(handle, "rb")


def read_json(path: Path, error: type[LlmlabError], limit: int = JSON_LIMIT) -> Any:
    """The file's JSON, or one line of `error`."""
    data = read_bytes(path, error, limit)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem})") from problem


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in place of one that is there. Raises InputError."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent)
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: can't be written ({getattr(problem, 'strerror', None) or problem})") from problem
    work = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        work.chmod(0o644)
        work.replace(path)
    except OSError as problem:
        work.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written ({problem.strerror or problem})") from problem
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_name(name: str) -> bool:
    """Whether `name` is a bare file name: no folder, no way out of one."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_free(path: Path, *, overwrite: bool, marker: str) -> None:
    """Raise InputError where something lies at `path` that may not be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} exists and is not a folder: choose another name")
    ours = (path / marker).is_file()
    if any(path.iterdir()) and not (ours and overwrite):
        what = "pass overwrite (--force) to replace it" if ours else "choose an empty or a new folder"
        raise InputError(f"{path} exists{'' if ours else f' and holds no {marker}'}: {what}")


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and vanishes when it raises or is interrupted.

    `overwrite` replaces an existing folder, but only one that holds the file `marker` or nothing: a folder that
    llmlab did not write is never removed. Raises InputError before anything is written.
    """
    path = path.absolute()
    try:
        _check_free(path, overwrite=overwrite, marker=marker)
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except InputError:
        raise
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: can't be written ({getattr(problem, 'strerror', None) or problem})") from problem
    try:
        work.chmod(0o755)
        yield work
        for file in work.iterdir():
            _fsync(file)
        _fsync(work)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            try:
                path.rename(old / path.name)
                work.rename(path)
            except BaseException:
                if not path.exists() and (old / path.name).exists():
                    (old / path.name).rename(path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            work.rename(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
