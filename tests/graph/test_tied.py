"""A tied embedding is one tensor from the checkpoint to the engine, also narrow, also where a constant multiplies it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

import llmlab as ll
from llmlab.graph.store.storage import constants

SHAPE = (tiny.VOCAB, 64)
SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"model_type": "cohere", "tie_word_embeddings": True, "logit_scale": 0.0625},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True, "head_dim": 16},
    "granite": {"model_type": "granite", "tie_word_embeddings": True, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
}  # fmt: skip
others_slow = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "granite")]


def embeddings(graph: ll.Graph) -> list[int]:
    """Bytes of each constant of the embedding's shape, whichever way round."""
    return [t._values.nbytes for t in constants(graph.surgeon) if tuple(t.shape) in (SHAPE, SHAPE[::-1])]


def engine_embeddings(folder: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of each tensor of the embedding's shape in an engine."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    entries = [{e.key: int(e.value) for e in t.external_data if e.key != "location"} for t in model.graph.initializer
               if tuple(t.dims) in (SHAPE, SHAPE[::-1])]  # fmt: skip
    return [(e["offset"], e["length"]) for e in entries]


@pytest.mark.parametrize("name", ["cohere", *others_slow])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_embedding_is_stored_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.make_model(SCALED[name] | {"num_hidden_layers": 1}).to(dtype).save_pretrained(tmp_path / "checkpoint")
    size = int(np.prod(SHAPE)) * dtype.itemsize
    plain = ll.export(tmp_path / "checkpoint")
    assert embeddings(plain) == [size]
    plain.save(tmp_path / "plain")
    serving = ll.optimize(ll.Graph.load(tmp_path / "plain"))
    assert embeddings(serving) == [size]
    assert embeddings(ll.convert(serving, "bfloat16")) == [int(np.prod(SHAPE)) * 2]
    ll.build(serving, tmp_path / "engine")
    assert [length for _, length in engine_embeddings(tmp_path / "engine")] == [int(np.prod(SHAPE)) * 4]


def test_two_tensors_that_are_not_tied_are_two(store: Any) -> None:
    """The count can tell; equal bytes under two names would be two as well: nothing reads them to find out."""
    assert len(embeddings(store.serving("llama"))) == 2
    assert len({offset for offset, _ in engine_embeddings(store.engine("llama"))}) == 2
