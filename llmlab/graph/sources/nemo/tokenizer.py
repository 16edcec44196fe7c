"""The tokenizer files that travel with a model, out of a NeMo archive."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from llmlab.checkpoint import ASSETS
from llmlab.errors import CheckpointError
from llmlab.graph.sources.nemo.archive import Archive


def read_tokenizer(archive: Archive, section: Any) -> tuple[dict[str, bytes], dict[str, int]]:
    """Hugging Face tokenizer files in the archive, by name, and the ids that a config takes from them.

    `section` is the config's `tokenizer`. What isn't in Hugging Face's format is left out, with a warning.
    """
    assets: dict[str, bytes] = {}
    for name in archive.names():
        own = PurePosixPath(name).name
        # NeMo puts a hash in front of the files that it registers.
        asset = next((a for a in ASSETS if own == a or own.endswith(f"_{a}")), None)
        if asset is not None and "/" not in name:
            assets.setdefault(asset, archive.read(name))
    if "tokenizer.json" not in assets:
        given = section if isinstance(section, Mapping) else {}
        named = (given.get(k) for k in ("model", "vocab_file", "type"))
        kind = next((text for text in named if text and isinstance(text, str)), "none")
        warnings.warn(
            f"{archive.path}: no tokenizer.json in it, so no tokenizer goes along (its config names: {kind[:100]}); "
            "put one into graph.assets['tokenizer.json'] before build",
            stacklevel=2,
        )
        return {}, {}
    return assets, _ids(archive, assets)


def _ids(archive: Archive, assets: Mapping[str, bytes]) -> dict[str, int]:
    """bos and eos, which NeMo leaves to the tokenizer."""
    try:
        known = {t["content"]: int(t["id"]) for t in json.loads(assets["tokenizer.json"]).get("added_tokens") or ()}
        settings = json.loads(assets.get("tokenizer_config.json", b"{}"))
        named = {key: settings.get(f"{key}_token") for key in ("bos", "eos")}
        texts = {key: t.get("content") if isinstance(t, dict) else t for key, t in named.items()}
        return {f"{key}_token_id": known[text] for key, text in texts.items() if text in known}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{archive.path}: its tokenizer.json or tokenizer_config.json is malformed") from problem
