"""Tensors written one after another, and what is beyond float16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmlab.checkpoint import read_safetensors
from llmlab.errors import UnsupportedModelError
from llmlab.graph.store import tensor_file
from llmlab.graph.store.deferred import DeferredValues
from llmlab.graph.store.tensor_file import ALIGN, write_tensors


class Counted(DeferredValues):
    """Random numbers, computed when asked for."""

    asked = 0

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        super().__init__(shape, np.dtype(np.float16))
        self.seed = seed

    def load(self) -> np.ndarray:
        Counted.asked += 1
        return np.random.default_rng(self.seed).standard_normal(self.shape).astype(np.float16)


@pytest.mark.parametrize("cores", [2, 16])
def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """By us and by others; in the same order and bytes however many threads compute."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    tensors = {
        "odd": np.arange(7, dtype=np.float32),
        **{f"w{i}": Counted(i, (16, 8 * (i + 1))) for i in range(9)},
        "bytes": np.arange(-128, 128, dtype=np.int8).reshape(2, 128),
        "half": np.ones((3, 5), ml_dtypes.bfloat16),
    }
    Counted.asked = 0
    write_tensors(tmp_path / "t", tensors)
    assert Counted.asked == 9
    found = load_file(tmp_path / "t")
    for name, tensor in tensors.items():
        want = tensor.load() if isinstance(tensor, Counted) else tensor
        assert found[name].dtype == want.dtype and (found[name] == want).all(), name
    stored = read_safetensors(tmp_path / "t")
    assert list(stored)[-2:] == ["odd", "half"]
    assert all(t.offset % ALIGN == 0 for n, t in stored.items() if n != "half")


@pytest.mark.parametrize("cores", [2, 16])
def test_numbers_beyond_float16_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(tensor_file, "_STRIP", 16)
    values = np.full((4, 16), 65504, np.float16)
    write_tensors(tmp_path / "t", {"w": values})
    values[3, 15] = -np.inf
    with pytest.raises(UnsupportedModelError, match="w: holds a number beyond float16's largest, 65504"):
        write_tensors(tmp_path / "t", {"v": np.ones(256, np.float16), "w": values})
