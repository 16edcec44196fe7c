"""Tiny random checkpoints: one per thing that the passes have to get right, with weights that make every part matter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

VOCAB = 96
MAX_LEN = 64
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    # Tied embeddings, as many KV heads as query heads, scaled frequencies.
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 32, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 6, "head_dim": 16},
}
SUPPORTED = tuple(MODELS)
"""Those that are served and held against transformers, each in every way."""
MODELS["one layer"] = {**MODELS["llama"], "num_hidden_layers": 1}  # exported in half the time, where more show no more


@functools.cache
def parse_operators_once() -> None:
    """Let torch's exporter parse its library of operators once a process: it would for each model, which takes 2 s of
    the 4 that a toy takes."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parse = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(cls: type, **options: Any) -> Any:
        registry, parsed = cls(), parse(**options)
        registry._opset_version = parsed.opset_version
        registry.functions = {name: list(found) for name, found in parsed.functions.items()}  # a caller adds its own
        return registry

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)


def randomise(model: Any, seed: int = 0) -> None:
    """Overwrite every parameter, biases and norms too: what is zero or one by default could be lost without notice."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                gain = 1.0 if "embed" in name or "wte" in name else 1.8
                parameter.copy_(values * gain / parameter.shape[-1] ** 0.5)
            else:
                norm = "norm" in name or ".ln" in name
                parameter.copy_(1 + 0.3 * values if norm and "bias" not in name else 0.3 * values)


def make_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model of `config` (over the common sizes) with random weights, in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    parse_operators_once()
    full = {**_COMMON, **config}
    config = AutoConfig.for_model(full.pop("model_type"), **full)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    return model


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    make_model(config, seed).save_pretrained(folder)
    return folder
