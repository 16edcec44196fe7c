"""Checkpoints in known sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmlab.checkpoint import read_safetensors
from llmlab.errors import InputError
from llmlab.zoo.shapes import SHAPES, sizes_of, tensors, write_checkpoint


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_checkpoint_has_the_tensors_of_its_sizes_in_shards(tmp_path: Path, tied: bool) -> None:
    sizes = {**SHAPES["tiny"], "tie_word_embeddings": tied}
    folder = write_checkpoint(tmp_path / "c", sizes, "float16", shard_bytes=30_000, seed=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: t.map() for file in set(index.values()) for name, t in read_safetensors(folder / file).items()}
    assert len(set(index.values())) > 1
    assert {n: tuple(t.shape) for n, t in found.items()} == dict(tensors(sizes)) and ("lm_head.weight" in found) != tied
    gate = np.asarray(found["model.layers.0.mlp.gate_proj.weight"], np.float32)
    assert 0.018 < gate.std() < 0.022 and abs(np.asarray(found["model.norm.weight"], np.float32).mean() - 1) < 0.01
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


def test_without_a_seed_the_weights_are_holes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", SHAPES["tinyllama-1.1b"])
    used = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) > 2 << 30 > 1 << 20 > used


def test_an_unknown_shape_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no shape 'llama-9', expected one of: tiny, .*llama-2-7b"):
        sizes_of("llama-9")
