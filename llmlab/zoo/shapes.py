"""Llama checkpoints in the sizes of known models, without their weights: random ones, or holes in a file.

Speed and memory depend on the sizes, not on the values; `llmlab bench --shape` and the benchmarks measure with these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmlab.errors import InputError
from llmlab.files import atomic_folder
from llmlab.progress import byte_bar

_LLAMA2 = {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0,
           "tie_word_embeddings": False}  # fmt: skip
_SMOL = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA2, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96},
    "smollm2-135m": {**_SMOL, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3},
    "smollm2-360m": {**_SMOL, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                     "num_attention_heads": 15, "num_key_value_heads": 5},
    "tinyllama-1.1b": {**_LLAMA2, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    "llama-2-7b": {**_LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "llama-3-8b": {**_LLAMA2, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                   "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "llama-2-70b": {**_LLAMA2, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
"""Sizes as Hugging Face's `config.json` names them."""
_NAMES: dict[str, tuple[str, Any]] = {
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
    "float32": ("F32", np.float32),
}
_STD = 0.02


def sizes_of(shape: str) -> dict[str, Any]:
    """The sizes of a shape by name. Raises InputError."""
    if shape not in SHAPES:
        raise InputError(f"no shape {shape!r}, expected one of: {', '.join(SHAPES)}")
    return SHAPES[shape]


def config(sizes: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The Hugging Face `config.json` of a Llama of these sizes."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
            "eos_token_id": 2, "torch_dtype": dtype, **sizes}  # fmt: skip


def tensors(sizes: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors in the order of its layers."""
    hidden, inner, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = sizes["num_key_value_heads"] * hidden // sizes["num_attention_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not sizes["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def write_checkpoint(
    folder: Path, sizes: dict[str, Any], dtype: str = "bfloat16", *, shard_bytes: int = 5 << 30, seed: int | None = None
) -> Path:
    """Write a checkpoint as `folder`, whole or not at all, in shards of up to `shard_bytes`.

    seed: random weights of about the size that a trained model's have, the same for the same seed; None: zeros that take
    no room on the disk. One tensor is in memory at a time.
    """
    name, values = _NAMES[dtype]
    shards = _shards(sizes, name, np.dtype(values).itemsize, shard_bytes)
    size = sum(math.prod(shape) for _, shape in tensors(sizes)) * np.dtype(values).itemsize
    index: dict[str, str] = {}
    with atomic_folder(folder, overwrite=False, marker="config.json") as work, byte_bar(size, "weights") as advance:
        for i, entries in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            header = json.dumps(entries).encode()
            header += b" " * (-len(header) % 8)
            with (work / file).open("wb") as out:
                out.write(len(header).to_bytes(8, "little") + header)
                out.truncate(len(header) + 8 + max(e["data_offsets"][1] for e in entries.values()))
                for number, entry in enumerate(entries.values()):
                    if seed is None:
                        break
                    random = np.random.default_rng([seed, i, number])
                    out.write(_draw(random, entry["shape"]).astype(values).view(np.uint8).data)
                    advance(entry["data_offsets"][1] - entry["data_offsets"][0])
            index |= dict.fromkeys(entries, file)
        summary = {"metadata": {"total_size": size}, "weight_map": index}
        (work / "model.safetensors.index.json").write_text(json.dumps(summary))
        (work / "config.json").write_text(json.dumps(config(sizes, dtype)))
    return folder


def _shards(sizes: dict[str, Any], name: str, itemsize: int, most: int) -> list[dict[str, Any]]:
    """The safetensors header of each shard."""
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for tensor, shape in tensors(sizes):
        size = itemsize * math.prod(shape)
        if end and end + size > most:
            shards, end = [*shards, {}], 0
        shards[-1][tensor] = {"dtype": name, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return shards


def _draw(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [shape]: a matrix around 0, a norm's weights around 1."""
    values = random.standard_normal(shape, np.float32)
    values *= np.float32(_STD)
    return values if len(shape) > 1 else values + 1
