"""The model families that are held against transformers: one list drives the test and the table of what works."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """A tiny model of one family: config over the common sizes of `tiny.py`, and what there is to get right."""

    config: dict[str, Any]
    features: str
    max_seq_len: int | None = None  # what the export is given


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def _factors(start: float, step: float) -> list[float]:
    return [start + step * i for i in range(8)]


_SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {**_SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"short_factor": _factors(1.0, 0.05), "long_factor": _factors(2.0, 0.4)}
_WINDOWS = {"sliding_window": 6, "head_dim": 16}

FAMILIES: dict[str, Family] = {
    "llama": Family({"model_type": "llama"}, "RMSNorm, SwiGLU, RoPE, GQA, untied head"),
    "llama (llama3 RoPE)": Family(
        {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4, **_rope("llama3", **_LLAMA3)},
        "frequencies scaled by part, MHA, tied head",
    ),
    "llama (yarn)": Family({"model_type": "llama", **_rope("yarn", **_SCALED)}, "YaRN frequencies and scale"),
    "llama (linear)": Family({"model_type": "llama", **_rope("linear", factor=4.0)}, "positions divided"),
    "llama (biases)": Family(
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        "a bias everywhere, MQA",
    ),
    **{
        f"llama (head size {size})": Family({"model_type": "llama", "head_dim": size}, f"heads of {size}")
        for size in (64, 80, 96, 128, 256)
    },
    "mistral": Family({"model_type": "mistral", **_WINDOWS}, "sliding window"),
    "mixtral": Family(
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        "mixture of experts, weights of one expert a tensor",
    ),
    "qwen2": Family({"model_type": "qwen2", "tie_word_embeddings": True}, "biases on q, k and v, tied head"),
    "qwen2 (windows)": Family(
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "a window in some layers",
    ),
    "qwen3": Family({"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1}, "q and k normed, MQA"),
    "qwen3_moe": Family(
        {
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "head_dim": 16,
        },
        "mixture of experts, q and k normed",
    ),
    "gemma2": Family(
        {
            "model_type": "gemma2",
            **_WINDOWS,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
        "softcaps, alternating windows, scaled embeddings, norms on both sides",
    ),
    "gemma3": Family(
        {
            "model_type": "gemma3_text",
            **_WINDOWS,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "two RoPE bases, windows in most layers, q and k normed",
    ),
    "phi3": Family({"model_type": "phi3"}, "fused QKV and gate/up"),
    "phi3 (longrope, short)": Family(
        {"model_type": "phi3", "original_max_position_embeddings": 64, **_rope("longrope", **_LONG)},
        "RoPE factors of sequences up to the original length",
    ),
    "phi3 (longrope, long)": Family(
        {"model_type": "phi3", "original_max_position_embeddings": 16, **_rope("longrope", **_LONG)},
        "RoPE factors of longer sequences, attention scaled",
        max_seq_len=64,
    ),
    "gpt2": Family(
        {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_positions": 64, "n_embd": 64, "tie_word_embeddings": True},
        "learned positions, LayerNorm, fused QKV, tied head",
    ),
    "gptj": Family(
        {"model_type": "gptj", "n_layer": 2, "n_head": 4, "n_positions": 64, "n_embd": 64, "rotary_dim": 8},
        "interleaved partial RoPE, parallel residual",
    ),
    "gpt_neo": Family(
        {
            "model_type": "gpt_neo",
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
        },
        "scores not scaled, alternating windows",
    ),
    "gpt_neox": Family({"model_type": "gpt_neox"}, "partial RoPE, parallel residual, QKV fused head by head"),
    "falcon": Family({"model_type": "falcon", "multi_query": True}, "MQA, parallel residual"),
    "falcon (ALiBi)": Family({"model_type": "falcon", "alibi": True}, "one KV head, ALiBi in bfloat16"),
    "falcon (grouped)": Family(
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
        "GQA, two norms",
    ),
    "mpt": Family({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "ALiBi"),
    "opt": Family(
        {"model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 64}, "learned positions with an offset, ReLU"
    ),
    "opt (narrow words)": Family(
        {"model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        "embeddings narrower than the model, norms behind",
    ),
    "bloom": Family({"model_type": "bloom", "n_layer": 2, "n_head": 4}, "ALiBi, embeddings normed"),
    "stablelm": Family({"model_type": "stablelm"}, "partial RoPE, LayerNorm, SwiGLU"),
    "olmo2": Family({"model_type": "olmo2"}, "norms behind attention and MLP, q and k normed before heads"),
    "granite": Family(
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "multipliers on embeddings, attention, residual and logits",
    ),
    "smollm3": Family({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "layers without RoPE"),
    "starcoder2": Family({"model_type": "starcoder2", "sliding_window": 6}, "LayerNorm, biases, sliding window"),
    "cohere": Family(
        {"model_type": "cohere", "logit_scale": 0.5, "use_qk_norm": True},
        "interleaved RoPE, parallel residual, logits scaled",
    ),
    "gpt_oss": Family(
        {"model_type": "gpt_oss", **_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
        "attention sinks, mixture of experts with biases and clipped SwiGLU, alternating windows",
    ),
}

QUICK = ("mixtral", "gemma2", "phi3 (longrope, long)", "gpt2", "gptj", "falcon (ALiBi)", "opt", "cohere", "gpt_oss")
"""One for each thing that there is to get right; the others are nightly, since torch takes seconds to export the smallest
model. llama, llama3, qwen2, qwen3 and mistral are in test_serving.py as well."""
_LAYERS_DIFFER = ("gemma2", "gpt_oss")


def shallow(family: Family) -> Family:
    """With one layer, which takes half as long to export; as it is where layers differ from each other."""
    if family.config["model_type"] in _LAYERS_DIFFER:
        return family
    names = ("num_hidden_layers", *(name for name in ("n_layer", "n_layers") if name in family.config))
    return replace(family, config={**family.config, **dict.fromkeys(names, 1)})
