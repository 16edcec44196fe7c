"""What earlier builds measured: TensorRT's timing cache where it can be read back, and how long each part took."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from llmlab.errors import InputError
from llmlab.files import read_bytes
from llmlab.tensorrt.gpu import visible_gpu
from llmlab.tensorrt.library import Library

_MAGIC = b"llmlab timing cache 1\n"
_LIMIT = 1 << 30  # bytes


class TimingCache:
    """Shared by all builds of a process, and by later ones through a file (None: no file).

    A file of another TensorRT or another GPU, or one that was altered, is as good as none: it is replaced.
    """

    def __init__(self, library: Library, file: Path | None) -> None:
        self.library = library
        self.file = file
        self.seconds: dict[str, float] = {}
        """How long the parts took that were built last, by their key."""
        self._bytes = b""
        self._live: tuple[Any, Any] | None = None  # the cache, and the configuration that made it
        if file is not None and file.exists():
            self._read(read_bytes(file, InputError, _LIMIT))

    def attach(self, config: Any) -> None:
        """Let a build that has this configuration use the cache and add to it."""
        if not self.library.timing_cache:
            return
        if self._live is None:
            cache = config.create_timing_cache(self._bytes)
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                cache = config.create_timing_cache(b"")
                config.set_timing_cache(cache, ignore_mismatch=False)
            self._live = cache, config
        else:
            config.set_timing_cache(self._live[0], ignore_mismatch=False)

    def save(self) -> None:
        """Write the file, whole or not at all. Raises InputError where that can't be done."""
        if self.file is None or not self.seconds:
            return
        measured = self._bytes
        if self._live is not None and self.library.timing_cache_bytes:
            measured = bytes(memoryview(self._live[0].serialize()))
        body = json.dumps(self.seconds, sort_keys=True).encode() + b"\n" + measured
        header = json.dumps({"made": self._made_by(), "sha256": hashlib.sha256(body).hexdigest()})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.file.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_MAGIC + header.encode() + b"\n" + body)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.file)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as problem:
            raise InputError(f"timing_cache {self.file}: can't be written ({problem.strerror})") from problem

    def _read(self, data: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            magic, header, body = data.split(b"\n", 2)
            facts = json.loads(header)
            if magic + b"\n" != _MAGIC or facts["made"] != self._made_by():
                return
            if facts["sha256"] != hashlib.sha256(body).hexdigest():
                return
            times, _, measured = body.partition(b"\n")
            self.seconds = {str(key): float(value) for key, value in json.loads(times).items()}
            self._bytes = measured if self.library.timing_cache_bytes else b""

    def _made_by(self) -> str:
        gpu = visible_gpu()
        return f"{self.library} on {gpu.name if gpu else 'no GPU'}"
