"""RoPE whose frequencies depend on how long the sequence is: the export has to choose one set of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from llmlab.errors import UnsupportedModelError

_ORIGINAL = "original_max_position_embeddings"


def rope_limit(raw: Mapping[str, Any], max_seq_len: int | None) -> int | None:
    """How long sequences may get with the frequencies that `max_seq_len` asks for, where those set a limit.

    raw: a Hugging Face config. Raises UnsupportedModelError for dynamic NTK scaling, which turns each position otherwise as a
    sequence grows.
    """
    limits = []
    for given in _settings(raw.get("rope_parameters") or raw.get("rope_scaling")):
        kind = given.get("rope_type", given.get("type"))
        if kind == "dynamic":
            raise UnsupportedModelError(
                f"{raw.get('model_type')}: its RoPE scaling is 'dynamic': frequencies change as a sequence grows, which keys "
                "in a cache can't follow; set another rope_type in config.json, such as 'yarn'"
            )
        original = given.get(_ORIGINAL, raw.get(_ORIGINAL))
        if (
            kind in ("longrope", "su")
            and isinstance(original, int)
            and (max_seq_len is None or max_seq_len <= original)
        ):
            limits.append(original)
    return min(limits, default=None)


def freeze_rope(config: Any, longest: int) -> None:
    """Give a transformers config whose RoPE has short and long factors the ones for sequences of `longest` tokens alone.

    What scales attention stays as it is: it doesn't depend on the sequence.
    """
    for given in _settings(getattr(config, "rope_parameters", None)):
        if given.get("rope_type") == "longrope":
            chosen = "long_factor" if longest > given[_ORIGINAL] else "short_factor"
            given["short_factor"] = given["long_factor"] = given[chosen]


def _settings(given: Any) -> Iterator[MutableMapping[str, Any]]:
    """RoPE settings of a config: one for the model, or one for each type of layer."""
    if isinstance(given, MutableMapping):
        if "rope_type" in given or "type" in given:
            yield given
        else:
            for inner in given.values():
                yield from _settings(inner)
