"""Any architecture that transformers knows, made small by setting the sizes that its config has."""

from __future__ import annotations

from typing import Any

from tiny import MAX_LEN, VOCAB, randomise

_MOST_PARAMETERS = 4_000_000
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size", "word_embed_proj_dim", "dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 80),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv", "global_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys((*_LENGTHS, "max_target_positions"), MAX_LEN),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 6),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    "eos_token_id": 2,
    "hidden_size_per_layer_input": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "state_size": 8,
}


class CannotShrink(Exception):
    """The architecture can't be made small by its common sizes alone, in one line."""


_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},  # latent attention has as many
    {"rotary_dim": 8},
    {"pad_token_id": 0},
    {"head_dim": 16},
    {"num_experts_per_tok": 1},
    {"is_decoder": True, "pad_token_id": 0},
)
"""What some want beside the common sizes; the first that makes a model is taken."""


def small_model(model_type: str) -> Any:
    """A causal language model of this type with random weights. Raises CannotShrink."""
    first = None
    for change in _CHANGES:
        try:
            return _make(model_type, change)
        except Exception as problem:  # whatever a config or a model makes of sizes it wasn't made for
            first = first or problem
    raise CannotShrink(" ".join(str(first).split())[:200] or type(first).__name__) from first


def _make(model_type: str, change: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(model_type)
    sizes: dict[str, Any] = {name: size for name, size in _SIZES.items() if _value(default, name) is not None}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = _value(default, name)
        if isinstance(kinds, list) and kinds and not isinstance(getattr(type(default), name, None), property):
            sizes[name] = [kinds[0], next((k for k in kinds if k != kinds[0]), kinds[0])]
    config = AutoConfig.for_model(model_type, **{**sizes, "pad_token_id": None, **change})
    if all(_value(config, name) is None for name in _LENGTHS):
        config.seq_length = MAX_LEN  # as checkpoints of models without a limit of their own say it
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise CannotShrink(f"it has {count} parameters with small sizes")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    return model


def _value(config: Any, name: str) -> Any:
    """What a config says, None where it says nothing or can't be asked."""
    try:
        return getattr(config, name, None)
    except Exception:  # attributes that differ by layer refuse
        return None
