"""model_config.yaml of a NeMo GPT model → the Hugging Face config of the model that computes the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmlab.errors import CheckpointError, UnsupportedModelError

_LIMIT = 64 << 10  # bytes; in use are about 10,000
_REFERENCE = re.compile(r"\$\{\.?(\w+)\}")
_PRODUCT = re.compile(r"\$\{multiply:\s*(\d+)\s*,\s*\$\{\.?(\w+)\}\s*\}")
# What NeMo's activations are called in transformers, and whether they are gated. "gelu" is the exact one.
_ACTIVATIONS = {
    "gelu": ("gelu", False),
    "relu": ("relu", False),
    "squared-relu": ("relu2", False),
    "approx-gelu": ("gelu_pytorch_tanh", False),
    "openai-gelu": ("gelu_pytorch_tanh", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
}
# What changes the arithmetic and isn't followed here: the only value that is accepted, which is also NeMo's default.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "num_moe_experts": (None, 0, 1),
    "window_size": (None,),
    "headscale": (False, None),
    "rotary_interleaved": (False, None),
    "attention_type": ("multihead", None),
    "transformer_block_type": ("pre_ln", None),
    "normalize_attention_scores": (True, None),
    "onnx_safe": (False, None),
    "openai_gelu": (False, None),
    "qk_layernorm": (False, None),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "post_layer_norm": (True, None),
    "apply_embedding_scaling": (False, None),
    "multi_query_attention": (False, None),
}


class NemoConfig:
    """The fields of a model_config.yaml that decide what the model computes. Raises one line for what isn't followed here."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        self.raw = _parse(data, where)
        for name, accepted in _PLAIN.items():
            if (given := self.raw.get(name)) not in accepted:
                raise UnsupportedModelError(f"{where}: {name} is {_brief(given)}, which isn't known here")
        self.layers = self._count("num_layers")
        self.hidden = self._count("hidden_size")
        self.heads = self._count("num_attention_heads")
        self.groups = self._count("num_query_groups", self.heads)
        if self.heads % self.groups or ("kv_channels" not in self.raw and self.hidden % self.heads):
            raise CheckpointError(
                f"{where}: {self.heads} heads in {self.groups} groups over {self.hidden} channels don't divide"
            )
        self.head_dim = self._count("kv_channels", self.hidden // self.heads)
        self.inner = self._count("ffn_hidden_size", 4 * self.hidden)
        self.length = self._count("max_position_embeddings", self._count("encoder_seq_length", 2048))
        self.tied = self._flag("share_embeddings_and_output_weights", True)
        self.bias = self._flag("bias", True)
        self.qkv_bias = self.bias or self._flag("qkv_bias", False) or self._flag("add_qkv_bias", False)
        self.rms = self._choice("normalization", "layernorm", ("layernorm", "layernorm1p", "rmsnorm")) == "rmsnorm"
        self.from_zero = self.raw.get("normalization") == "layernorm1p" or self._flag(
            "layernorm_zero_centered_gamma", False
        )
        """Whether a norm's weight is stored as its distance from one."""
        given = self.raw.get("activation", "gelu")
        given = given if isinstance(given, str) else _brief(given)
        activation = given.removeprefix("fast-")
        if activation not in _ACTIVATIONS:
            raise UnsupportedModelError(f"{where}: activation is {_brief(given)}; known: {', '.join(_ACTIVATIONS)}")
        self.activation, self.gated = _ACTIVATIONS[activation]
        if self.activation == "gelu" and self._fused_gelu():
            self.activation = "gelu_pytorch_tanh"
        self.rope = self._choice("position_embedding_type", "learned_absolute", ("learned_absolute", "rope")) == "rope"

    def to_hf(self, vocab: int) -> dict[str, Any]:
        """The config.json: a llama (or qwen2), a nemotron, or a gpt2, whichever has these norms, positions and MLP."""
        common = {"vocab_size": vocab, "tie_word_embeddings": self.tied, "bos_token_id": None, "eos_token_id": None}
        if not self.rope and not self.rms and not self.gated and self.groups == self.heads and self._even_heads():
            return common | {
                "model_type": "gpt2",
                "n_embd": self.hidden,
                "n_layer": self.layers,
                "n_head": self.heads,
                "n_inner": self.inner,
                "n_positions": self.length,
                "activation_function": self.activation,
                "layer_norm_epsilon": self._epsilon(),
            }
        rotary = self._number("rotary_percentage", 1.0)
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "hidden_act": self.activation,
            "max_position_embeddings": self.length,
        }
        biases = {"attention_bias": self.bias, "mlp_bias": self.bias}
        if self.rope and self.rms and self.gated and rotary == 1.0:
            sizes |= {"rms_norm_eps": self._epsilon(), "rope_parameters": self._rope()}
            if self.qkv_bias and not self.bias:
                return common | sizes | {"model_type": "qwen2"}
            return common | sizes | biases | {"model_type": "llama"}
        if self.rope and not self.rms and not self.gated and self.qkv_bias == self.bias:
            partial = {"rope_parameters": self._rope() | {"partial_rotary_factor": rotary}}
            return common | sizes | biases | partial | {"model_type": "nemotron", "norm_eps": self._epsilon()}
        kind = f"{'RMS' if self.rms else 'Layer'}Norm, {'a gated' if self.gated else 'a plain'} MLP"
        positions = f"rotary positions over {rotary:.0%} of a head" if self.rope else "learned positions"
        raise UnsupportedModelError(
            f"{self.where}: {kind} and {positions}, {self.heads} heads in {self.groups} groups: no such model is known here"
        )

    def _even_heads(self) -> bool:
        return self.head_dim * self.heads == self.hidden

    def _fused_gelu(self) -> bool:
        """Whether NeMo computes GELU in its fused kernel, which is the tanh approximation. It needs a bias to fuse, but for
        Megatron core's gated one."""
        fused = self._flag("bias_activation_fusion", self._flag("bias_gelu_fusion", True))
        return fused and (self.bias or (self.gated and self._flag("mcore_gpt", False)))

    def _rope(self) -> dict[str, Any]:
        theta = {"rope_theta": self._number("rotary_base", 10000.0)}
        linear, llama3 = (
            self._number("seq_len_interpolation_factor", 0),
            self._flag("scale_positional_embedding", False),
        )
        if linear and llama3:
            raise UnsupportedModelError(
                f"{self.where}: sets both seq_len_interpolation_factor and scale_positional_embedding; unpack it and remove one"
            )
        if linear:
            return theta | {"rope_type": "linear", "factor": linear}
        if llama3:  # Megatron core's constants
            scales = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return theta | scales | {"rope_type": "llama3", "original_max_position_embeddings": 8192}
        return theta | {"rope_type": "default"}

    def _epsilon(self) -> float:
        return self._number("layernorm_epsilon", 1e-5)

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._resolve(self.raw.get(name))
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise CheckpointError(f"{self.where}: '{name}' is {_brief(value)}, expected a positive integer")
        return value

    def _number(self, name: str, default: float) -> float:
        """A positive number. YAML reads 1e-5, without a point, as text."""
        value = self._resolve(self.raw.get(name))
        try:
            number = default if value is None else float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < float("inf"):
            raise CheckpointError(f"{self.where}: '{name}' is {_brief(value)}, expected a positive number")
        return number

    def _resolve(self, value: Any) -> Any:
        """The number behind a reference to another field, as such files write it: `${.hidden_size}`."""
        if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
            return self.raw.get(match[1])
        if isinstance(value, str) and (match := _PRODUCT.fullmatch(value)):
            factor = self.raw.get(match[2])
            return int(match[1]) * factor if isinstance(factor, int) else value
        return value

    def _flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: '{name}' is {_brief(value)}, expected true or false")
        return value

    def _choice(self, name: str, default: str, known: tuple[str, ...]) -> str:
        value = self.raw.get(name) or default
        if not isinstance(value, str) or value not in known:
            raise UnsupportedModelError(f"{self.where}: {name} is {_brief(value)}; known: {', '.join(known)}")
        return value


def _parse(data: bytes, where: str) -> dict[str, Any]:
    import yaml

    if len(data) > _LIMIT:
        raise CheckpointError(f"{where}: {len(data)} bytes, more than the {_LIMIT} that such a file may have")
    try:
        raw = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where}: not valid YAML ({' '.join(str(problem).split())[:200]})") from problem
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: expected a mapping of names to values, got {type(raw).__name__}")
    return raw


def _brief(value: Any) -> str:
    """A value for a message; what is nested isn't written out, since aliases can make it endless."""
    return repr(value)[:100] if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
