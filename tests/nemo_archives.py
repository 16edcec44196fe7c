"""NeMo archives written from Hugging Face models, in the layouts that NeMo's own converters write."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml

NAMES = {
    "core": {
        "tokens": "model.embedding.word_embeddings",
        "positions": "model.embedding.position_embeddings",
        "norm": "model.decoder.final_layernorm",
        "head": "model.output_layer",
        "layer": "model.decoder.layers.{}.",
        "norm1": "self_attention.linear_qkv.layer_norm_",
        "qkv": "self_attention.linear_qkv.",
        "out": "self_attention.linear_proj.",
        "norm2": "mlp.linear_fc1.layer_norm_",
        "fc1": "mlp.linear_fc1.",
        "fc2": "mlp.linear_fc2.",
    },
    "legacy": {
        "tokens": "model.language_model.embedding.word_embeddings",
        "positions": "model.language_model.embedding.position_embeddings",
        "norm": "model.language_model.encoder.final_layernorm",
        "head": "model.language_model.output_layer",
        "layer": "model.language_model.encoder.layers.{}.",
        "norm1": "input_layernorm.",
        "qkv": "self_attention.query_key_value.",
        "out": "self_attention.dense.",
        "norm2": "post_attention_layernorm.",
        "fc1": "mlp.dense_h_to_4h.",
        "fc2": "mlp.dense_4h_to_h.",
    },
}


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    """Each group's query heads, its key head, its value head, as `convert_llama_hf_to_nemo.py` joins them."""
    per_group = q.shape[0] // dim // groups
    heads = [t.reshape(-1, dim, *t.shape[1:]) for t in (q, k, v)]
    parts = []
    for g in range(groups):
        parts += [heads[0][g * per_group : (g + 1) * per_group], heads[1][g : g + 1], heads[2][g : g + 1]]
    return torch.cat(parts).reshape(-1, *q.shape[1:]).contiguous()


def llama_like(model: Any, names: str = "core") -> dict[str, torch.Tensor]:
    """The state dict of a Llama or a Nemotron under NeMo's names."""
    own, name, config = model.state_dict(), NAMES[names], model.config
    state = {f"{name['tokens']}.weight": own["model.embed_tokens.weight"]}
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", name["layer"].format(layer)
        for kind in ("weight", "bias"):
            if f"{source}self_attn.q_proj.{kind}" in own:
                qkv = (own[f"{source}self_attn.{p}_proj.{kind}"] for p in "qkv")
                state[f"{target}{name['qkv']}{kind}"] = fused_qkv(*qkv, config.num_key_value_heads, config.head_dim)
                state[f"{target}{name['out']}{kind}"] = own[f"{source}self_attn.o_proj.{kind}"]
                fc1 = [own[n] for p in ("gate", "up") if (n := f"{source}mlp.{p}_proj.{kind}") in own]
                state[f"{target}{name['fc1']}{kind}"] = torch.cat(fc1)
                state[f"{target}{name['fc2']}{kind}"] = own[f"{source}mlp.down_proj.{kind}"]
            for norm, ours in (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
                if f"{source}{norm}.{kind}" in own:
                    state[f"{target}{name[ours]}{kind}"] = own[f"{source}{norm}.{kind}"]
    for kind in ("weight", "bias"):
        if f"model.norm.{kind}" in own:
            state[f"{name['norm']}.{kind}"] = own[f"model.norm.{kind}"]
    if not config.tie_word_embeddings:
        state[f"{name['head']}.weight"] = own["lm_head.weight"]
    return {n: t.detach().clone() for n, t in state.items()}


def gpt2(model: Any, names: str = "legacy") -> dict[str, torch.Tensor]:
    """The state dict of a GPT-2 under NeMo's names."""
    own, name, config = model.state_dict(), NAMES[names], model.config
    dim = config.n_embd // config.n_head
    state = {f"{name['tokens']}.weight": own["transformer.wte.weight"]}
    state[f"{name['positions']}.weight"] = own["transformer.wpe.weight"]
    for layer in range(config.n_layer):
        source, target = f"transformer.h.{layer}.", name["layer"].format(layer)
        for kind in ("weight", "bias"):
            qkv = own[f"{source}attn.c_attn.{kind}"].t().contiguous().chunk(3)
            state[f"{target}{name['qkv']}{kind}"] = fused_qkv(*qkv, config.n_head, dim)
            for theirs, ours in (("attn.c_proj", "out"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2")):
                state[f"{target}{name[ours]}{kind}"] = own[f"{source}{theirs}.{kind}"].t().contiguous()
            for theirs, ours in (("ln_1", "norm1"), ("ln_2", "norm2")):
                state[f"{target}{name[ours]}{kind}"] = own[f"{source}{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"{name['norm']}.{kind}"] = own[f"transformer.ln_f.{kind}"]
    return {n: t.detach().clone() for n, t in state.items()}


def llama_config(model: Any, **changes: Any) -> dict[str, Any]:
    """The model_config.yaml of a Llama or a Nemotron: what decides the arithmetic, and a little of the rest."""
    c = model.config
    rope = c.rope_parameters
    return {
        "mcore_gpt": True,
        "micro_batch_size": 4,
        "tensor_model_parallel_size": 1,
        "encoder_seq_length": c.max_position_embeddings,
        "max_position_embeddings": "${.encoder_seq_length}",
        "num_layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "ffn_hidden_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads,
        "num_query_groups": c.num_key_value_heads,
        "kv_channels": c.head_dim,
        "normalization": "rmsnorm",
        "layernorm_epsilon": getattr(c, "rms_norm_eps", 1e-5),
        "bias": False,
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": rope["rope_theta"],
        "share_embeddings_and_output_weights": c.tie_word_embeddings,
        "tokenizer": {"library": "huggingface", "type": "org/model"},
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        **changes,
    }


def saved(state: Any) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def write_archive(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    """A .nemo file with `files`, named as NeMo's tar names them."""
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def archive_files(config: dict[str, Any], state: dict[str, Any], **more: bytes) -> dict[str, bytes]:
    return {"model_config.yaml": yaml.safe_dump(config).encode(), "model_weights.ckpt": saved(state), **more}
