"""Tensors in one safetensors file, written one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmlab.checkpoint import DTYPES
from llmlab.errors import UnsupportedModelError
from llmlab.graph.store.lazy import Values
from llmlab.graph.store.storage import loaded, release
from llmlab.progress import byte_bar

ALIGN = 256
"""Bytes: where the data begins, and every tensor as long as those before are multiples of it, which come first."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Values]) -> None:
    """Write tensors by name; those that are computed are so when they are written. Peak memory is the largest of them.

    Raises UnsupportedModelError for a number that became infinite in float16.
    """
    sizes = {name: int(np.prod(t.shape, dtype=np.int64)) * np.dtype(t.dtype).itemsize for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: sizes[name] % ALIGN != 0)
    header, at = {}, 0
    for name in order:
        place = [at, at := at + sizes[name]]
        dtype = _NAMES[np.dtype(tensors[name].dtype)]
        header[name] = {"dtype": dtype, "shape": [int(d) for d in tensors[name].shape], "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    with path.open("wb") as file, byte_bar(at, "weights") as advance:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            values = np.ascontiguousarray(loaded(tensors[name]))
            _check(name, values)
            file.write(values.reshape(-1).view(np.uint8).data)
            del values
            release(tensors[name])
            advance(sizes[name])


def _check(name: str, values: np.ndarray) -> None:
    """float16 is the one type whose range is smaller than that of what checkpoints hold; its largest bits are infinity's."""
    if values.dtype == np.float16 and values.size and int((values.view(np.uint16) & 0x7FFF).max()) >= 0x7C00:
        raise UnsupportedModelError(f"{name}: holds a number beyond float16's largest, 65504: build with bfloat16")
