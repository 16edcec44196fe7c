"""Tensors in files beside an ONNX file, as memory maps: inside its folder, through no link, within the file's size."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
from onnx import TensorProto

from llmlab.errors import GraphError
from llmlab.graph.store.deferred import Packed
from llmlab.graph.store.lazy import Values
from llmlab.graph.store.packed import is_packed
from llmlab.graph.store.tensors import tensor_bytes, tensor_dtype

_DIGITS = 20  # of a number in an entry; 2⁶⁴ has as many


def map_external(
    model: Path,
    tensors: Iterable[TensorProto],
    only: str | None = None,
    references: Mapping[str, BinaryIO] = MappingProxyType({}),
) -> dict[str, Values]:
    """Memory maps of the external ones among `tensors`, by name; all of them must lie in the file `only`, if that is given,
    or in one of `references`: open files that were checked elsewhere, by location."""
    data = _Files(model, only, references)
    try:
        arrays = {t.name: data.map(t) for t in tensors if t.data_location == TensorProto.EXTERNAL}
        data.check_overlaps()
        return arrays
    finally:
        data.close()


class _Files:
    """The files that the external tensors of `model` (the path of an ONNX file) lie in, each opened once; `only` one, if given.

    Every path is walked folder by folder without following links, from the file's own folder downwards, so that what is
    checked is what is read.
    """

    def __init__(self, model: Path, only: str | None, references: Mapping[str, BinaryIO]) -> None:
        self.model, self.folder, self.only = model, model.parent, only
        self._files = dict(references)
        self._taken: dict[str, dict[int, int]] = {}

    def map(self, tensor: TensorProto) -> Values:
        """The tensor as a read-only memory map, one of four-bit numbers as a map of their bytes. Raises GraphError where its entry is not to be followed."""
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        label = f"{self.model}: {tensor.name!r}"
        if len(entry) != len(tensor.external_data):
            raise GraphError(f"{label}: its entry says something twice: altered, export it again")
        if self.only not in (None, location) and location not in self._files:
            raise GraphError(f"{label} points to {location!r}, expected {self.only!r} beside the graph")
        offset = _number(entry, "offset", label)
        length = _number(entry, "length", label) if "length" in entry else None
        wanted = tensor_bytes(tensor)
        dtype, shape = tensor_dtype(tensor), tuple(tensor.dims)
        four_bits = is_packed(dtype)
        if not four_bits and dtype.itemsize * int(np.prod(shape, dtype=object)) != wanted:
            raise GraphError(f"{label} has values of two bits in another file; store it in the graph")
        if length not in (None, wanted):
            raise GraphError(f"{label} of shape {list(tensor.dims)} needs {wanted} bytes, its entry gives it {length}")
        file = self._open(location, label)
        size = os.fstat(file.fileno()).st_size
        if wanted == 0 or offset + wanted > size:
            raise GraphError(
                f"{label} wants bytes {offset} to {offset + wanted} of {location}, which has {size}: truncated or altered"
            )
        self._taken.setdefault(location, {})[offset] = max(wanted, self._taken.get(location, {}).get(offset, 0))
        if four_bits:
            return Packed(np.memmap(file, np.uint8, "r", offset, (wanted,)), shape, dtype)
        return np.memmap(file, dtype, "r", offset, shape)

    def check_overlaps(self) -> None:
        """No tensor may lie across the beginning of another; the same bytes under two names are a tied weight."""
        for location, taken in self._taken.items():
            end = 0
            for offset in sorted(taken):
                if offset < end:
                    raise GraphError(
                        f"{self.model}: tensors overlap at byte {offset} of {location}: altered, export it again"
                    )
                end = offset + taken[offset]

    def close(self) -> None:
        """Close the files; the maps stay."""
        for file in self._files.values():
            file.close()

    def _open(self, location: str, label: str) -> BinaryIO:
        if location in self._files:
            return self._files[location]
        parts = location.split("/")
        if (
            "\\" in location
            or ":" in location
            or not location.isprintable()
            or any(p in ("", ".", "..") for p in parts)
        ):
            raise GraphError(f"{label} points to {location!r}, expected a file inside the folder of the graph")
        try:
            self._files[location] = self._walk(parts)
        except OSError as problem:
            what = (
                "a link or no file" if problem.errno in (errno.ELOOP, errno.ENOTDIR, errno.EINVAL) else problem.strerror
            )
            raise GraphError(f"{label} points to {location!r}, which can't be read ({what})") from problem
        return self._files[location]

    def _walk(self, parts: list[str]) -> BinaryIO:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        at = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(parts):
            try:
                below = os.open(part, flags | (os.O_DIRECTORY if i < len(parts) - 1 else 0), dir_fd=at)
            finally:
                os.close(at)
            at = below
        if not stat.S_ISREG(os.fstat(at).st_mode):
            os.close(at)
            raise OSError(errno.EINVAL, "not a regular file")
        return os.fdopen(at, "rb")


def _number(entry: Mapping[str, str], key: str, label: str) -> int:
    text = entry.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise GraphError(f"{label}: its {key} is malformed ({text[:40]!r}), expected a number of bytes")
    return int(text)
