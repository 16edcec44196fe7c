"""Every checkpoint's tensors come to the parameters that transformers would give them, and stay on disk until written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, core_model_loading

from llmlab.checkpoint import Checkpoint
from llmlab.errors import CheckpointError, UnsupportedModelError
from llmlab.graph.sources import conversion
from llmlab.graph.sources.conversion import Source, convert
from llmlab.graph.sources.weights import locate_weights
from llmlab.graph.store.lazy import Joined, LazyArray, Stacked
from llmlab.graph.store.storage import DeferredValues

CHECKPOINTS: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": ({"model_type": "mixtral", "num_local_experts": 4}, 4),
    "qwen3_moe": ({"model_type": "qwen3_moe", "num_experts": 12, "moe_intermediate_size": 16}, 4),
    "granitemoe": ({"model_type": "granitemoe", "num_local_experts": 4}, 0),
    "gpt_neox": ({"model_type": "gpt_neox", "tie_word_embeddings": True}, 0),
    "gpt2": ({"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64}, 0),
}
"""Config, and how many parameters have to be put together from several tensors."""


def values(weight: Any) -> np.ndarray:
    return weight.values.load() if isinstance(weight.values, DeferredValues) else weight.values


def same_as_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = locate_weights(model, Checkpoint(folder))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = values(found[name])
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert np.array_equal(array.astype(np.float32), tensor.float().numpy()), name
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_comes_as_transformers_loads_it(tmp_path: Path, name: str) -> None:
    config, converted = CHECKPOINTS[name]
    found = same_as_transformers(tiny.write_checkpoint(tmp_path, config))
    assert sum(isinstance(w.values, LazyArray) for w in found.values()) == converted
    assert all(isinstance(w.values, (np.memmap, LazyArray)) for w in found.values())
    on_disk = load_file(tmp_path / "model.safetensors")
    assert all(w.name in on_disk for w in found.values() if not isinstance(w.values, LazyArray))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_and_stored_narrow(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.make_model(CHECKPOINTS["mixtral"][0] | {"tie_word_embeddings": True}).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 2
    found = same_as_transformers(tmp_path, dtype)
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]


def test_the_base_models_checkpoint_has_a_place_too(tmp_path: Path) -> None:
    """Saved without the head, so without the `model.` in front of its names."""
    model = tiny.make_model({"model_type": "llama", "tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    bare = {n.removeprefix("model."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_as_transformers(tmp_path)


def test_two_experts_that_trade_places_are_seen(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, CHECKPOINTS["mixtral"][0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    a, b = (f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, path, metadata={"format": "pt"})
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = values(locate_weights(model, Checkpoint(tmp_path))[name])
    expected = model.state_dict()[name].numpy()
    assert not np.array_equal(found, expected) and np.array_equal(found[2:], expected[2:])


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            "has shape [3, 64, 80], the config asks for [4, 64, 80]",
        ),
        ("model.layers.0.block_sparse_moe.experts.1.w3.weight", "can't be joined along axis 1"),
        ("model.norm.weight", "no tensor 'model.norm.weight' in it"),
    ],
)
def test_a_missing_tensor_is_one_line(tmp_path: Path, drop: str, message: str) -> None:
    tiny.write_checkpoint(tmp_path, CHECKPOINTS["mixtral"][0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[drop]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        locate_weights(model, Checkpoint(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_operation_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_checkpoint(tmp_path, CHECKPOINTS["mixtral"][0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.delitem(conversion._OPERATIONS, "MergeModulelist")
    with pytest.raises(UnsupportedModelError, match="transformers makes it with MergeModulelist, which isn't known"):
        locate_weights(model, Checkpoint(tmp_path))


class Config:
    num_attention_heads = 2


ONE = {"a.x": (12, 6)}
OPERATIONS: dict[
    str, tuple[list[Any], list[str], list[str], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]
] = {
    "stack, join": (
        [core_model_loading.MergeModulelist(0), core_model_loading.Concatenate(1)],
        ["e.*.g", "e.*.u"],
        ["x"],
        {f"a.e.{i}.{w}": (4, 3) for i in range(11) for w in "gu"},
        {"a.x": (11, 8, 3)},
    ),
    "stack": (
        [core_model_loading.MergeModulelist(1)],
        ["e.*.g"],
        ["x"],
        {f"a.e.{i}.g": (4, 3) for i in range(2)},
        {"a.x": (4, 2, 3)},
    ),
    "chunk": ([core_model_loading.Chunk(0)], ["x"], ["q", "k", "v"], ONE, dict.fromkeys(("a.q", "a.k", "a.v"), (4, 6))),
    "split": ([core_model_loading.Split(0)], ["x"], ["q", "k"], ONE, {"a.q": (9, 6), "a.k": (3, 6)}),
    "transpose": ([core_model_loading.Transpose(0, 1)], ["x"], ["y"], ONE, {"a.y": (6, 12)}),
    "no transpose": ([core_model_loading.Transpose(0, 1, check_dims=True)], ["x"], ["y"], ONE, {"a.y": (12, 6)}),
    "interleave": ([core_model_loading.Interleave(0)], ["x"], ["y"], ONE, {"a.y": (12, 6)}),
    "interleave back": ([core_model_loading.Interleave(0, inverse=True)], ["x"], ["y"], ONE, {"a.y": (12, 6)}),
    "interleave, chunk": (
        [core_model_loading.Interleave(1), core_model_loading.Chunk(1)],
        ["x"],
        ["q", "k"],
        ONE,
        {"a.q": (12, 3), "a.k": (12, 3)},
    ),
    "permute": ([core_model_loading.PermuteForRope()], ["x"], ["y"], ONE, {"a.y": (12, 6)}),
    "permute back": ([core_model_loading.PermuteForRope(inverse=True)], ["x"], ["y"], ONE, {"a.y": (12, 6)}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_transformers(name: str) -> None:
    operations, patterns, targets, shapes, results = OPERATIONS[name]
    tensors = {n: torch.randn(s) for n, s in shapes.items()}
    converter = core_model_loading.WeightConverter(list(patterns), list(targets), operations)
    names: dict[str, list[str]] = {}
    for key in sorted(tensors, key=core_model_loading.dot_natural_key):
        renamed, pattern = core_model_loading.rename_source_key(key, [], [converter])
        names.setdefault(str(pattern), []).append(key)
        converter.add_tensor(renamed, key, str(pattern), tensors[key])  # type: ignore[arg-type]
    found = convert(renamed, Source(names, converter), lambda n: tensors[n].numpy(), results, Config())

    class Model:
        def get_parameter(self, name: str) -> torch.Tensor:
            return torch.empty(results[name])

    expected = converter.convert(renamed, model=Model(), config=Config())
    assert found.keys() == expected.keys() == results.keys()
    for parameter, array in found.items():
        assert tuple(array.shape) == results[parameter]
        loaded = array.load() if isinstance(array, DeferredValues) else array
        assert np.array_equal(loaded, expected[parameter].numpy())


def test_a_stack_of_joins_is_written_in_place() -> None:
    """Nested arrays ask for one buffer, the result's."""
    parts = [np.full((2, 3), i, np.float32) for i in range(4)]
    whole = Stacked([Joined(parts[:2], 0), Joined(parts[2:], 0)], 1)
    assert np.array_equal(whole.load(), np.stack([np.concatenate(parts[:2]), np.concatenate(parts[2:])], 1))
    for arrays in whole.parts:
        assert isinstance(arrays, LazyArray)
        arrays.load = None  # type: ignore[method-assign, assignment]
    assert whole.load().shape == (4, 2, 3)
