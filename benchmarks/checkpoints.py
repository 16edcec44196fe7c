"""Llama checkpoints of known sizes: sharded safetensors with true headers, over holes in a file or random weights.

Usage: python benchmarks/checkpoints.py llama-2-7b FOLDER --dtype bfloat16, which takes a few KB of the disk.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_LLAMA2 = {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA2, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96},
    "tinyllama-1.1b": {**_LLAMA2, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    "llama-2-7b": {**_LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "llama-2-70b": {**_LLAMA2, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
_NAMES: dict[str, tuple[str, Any]] = {
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
    "float32": ("F32", np.float32),
}


def config(sizes: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The Hugging Face `config.json` of a Llama of these sizes, its head untied."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
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
    yield "lm_head.weight", (vocab, hidden)


def write_checkpoint(
    folder: Path, sizes: dict[str, Any], dtype: str = "bfloat16", *, shard_bytes: int = 5 << 30, seed: int | None = None
) -> Path:
    """Write a checkpoint in shards of up to `shard_bytes`: zeros that take no room on the disk, or with `seed` random
    weights of about the size that a trained model's have, written one tensor at a time."""
    name, itemsize = _NAMES[dtype][0], np.dtype(_NAMES[dtype][1]).itemsize
    folder.mkdir(parents=True)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for tensor, shape in tensors(sizes):
        size = itemsize
        for n in shape:
            size *= n
        if end and end + size > shard_bytes:
            shards, end = [*shards, {}], 0
        shards[-1][tensor] = {"dtype": name, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    index = {}
    for i, entries in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(len(header) + 8 + max(e["data_offsets"][1] for e in entries.values()))
            for number, entry in enumerate(entries.values() if seed is not None else ()):
                values = np.random.default_rng([seed, i, number]).standard_normal(entry["shape"], np.float32)
                values = values * np.float32(0.02) if values.ndim > 1 else 1 + values * np.float32(0.02)
                out.write(np.asarray(values, _NAMES[dtype][1]).view(np.uint8).data)
        index |= dict.fromkeys(entries, file)
    size = sum(math.prod(shape) for _, shape in tensors(sizes)) * itemsize
    summary = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config(sizes, dtype)))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=_NAMES)
    parser.add_argument("--seed", type=int, help="random weights instead of zeros that take no room")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.folder, SHAPES[arguments.shape], arguments.dtype, seed=arguments.seed))
