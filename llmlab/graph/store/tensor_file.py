"""Tensors in one safetensors file, computed and written one after another."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
_MOST_THREADS = 4
_STRIP = 1 << 20  # numbers that are looked at together


def write_tensors(path: Path, tensors: Mapping[str, Values]) -> None:
    """Write tensors by name; those that are computed are so when they are written. Peak memory is the largest of them, or a few on
    a machine of many cores, which computes the next ones meanwhile.

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
        for name, values in _computed(tensors, order):
            file.write(values.reshape(-1).view(np.uint8).data)
            del values
            release(tensors[name])
            advance(sizes[name])


def _computed(tensors: Mapping[str, Values], order: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's values in turn; a quarter of the cores, at most four, are ahead."""
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 4)
    if threads < 2:
        for name in order:
            yield name, _values(name, tensors[name])
        return
    pending: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name in order:
                pending.append((name, pool.submit(_values, name, tensors[name])))
                if len(pending) >= threads:
                    done, future = pending.popleft()
                    yield done, future.result()
                    del future
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _values(name: str, tensor: Values) -> np.ndarray:
    values = np.ascontiguousarray(loaded(tensor))
    if values.dtype == np.float16:  # the one type whose range is smaller than that of what checkpoints hold
        bits = values.reshape(-1).view(np.uint16)
        for start in range(0, bits.size, _STRIP):
            if int((bits[start : start + _STRIP] & 0x7FFF).max()) >= 0x7C00:
                raise UnsupportedModelError(
                    f"{name}: holds a number beyond float16's largest, 65504: build with bfloat16"
                )
    return values
