"""A model's configuration, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmlab.errors import CheckpointError, InputError

# Other names that configs of older families use for the same field.
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "n_ctx"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The few facts about a model that llmlab itself uses; everything else is read off the graph."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    """Longest sequence the model was made for, in tokens."""
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The whole config.json."""

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str = "config") -> ModelConfig:
        """Read a Hugging Face config. Raises CheckpointError that names the first missing or absurd field."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where}: expected a JSON object, got {type(raw).__name__}: is this a config.json?")
        text = raw.get("text_config") if isinstance(raw.get("text_config"), Mapping) else {}

        def find(name: str) -> Any:
            for key in (name, *_ALIASES.get(name, ())):
                for source in (raw, text):
                    if source and source.get(key) is not None:
                        return source[key]
            if name == "num_heads" and "model_type" in raw:
                raise CheckpointError(
                    f"{where}: no 'num_heads' in it: a model without attention can't be served; if it has some, add the field"
                )
            raise CheckpointError(f"{where}: no '{name}' in it; add the field or export a complete checkpoint")

        def count(name: str) -> int:
            value = find(name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise CheckpointError(f"{where}: '{name}' is {value!r}, expected a positive integer")
            return value

        model_type = find("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{where}: 'model_type' is {model_type!r}, expected a string such as 'llama'")
        return cls(
            model_type=model_type,
            vocab_size=count("vocab_size"),
            hidden_size=count("hidden_size"),
            num_layers=count("num_layers"),
            num_heads=count("num_heads"),
            max_position_embeddings=count("max_position_embeddings"),
            eos_token_ids=token_ids(raw.get("eos_token_id"), f"{where}: eos_token_id"),
            raw=dict(raw),
        )

    def limited(self, max_seq_len: int | None) -> ModelConfig:
        """The same model for sequences of up to `max_seq_len` tokens (None: as it is). Raises InputError where it can't be."""
        if max_seq_len is None:
            return self
        if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int) or max_seq_len < 1:
            raise InputError(f"max_seq_len is {max_seq_len!r}, expected a positive number of tokens")
        if max_seq_len > self.max_position_embeddings:
            raise InputError(
                f"max_seq_len is {max_seq_len}, but the model takes sequences of up to {self.max_position_embeddings} tokens"
            )
        raw = {**self.raw, "max_position_embeddings": max_seq_len}
        return replace(self, max_position_embeddings=max_seq_len, raw=raw)

    def to_dict(self) -> dict[str, Any]:
        """The config.json it came from (what `from_hf` reads)."""
        return dict(self.raw)


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """`None`, one id or a list of ids, as configs write `eos_token_id`, as a tuple."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise CheckpointError(f"{where} is {value!r}, expected a token id or a list of them")
    return ids
