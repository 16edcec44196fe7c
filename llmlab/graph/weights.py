"""A checkpoint's tensors in the places of a model's parameters."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmlab.checkpoint import Checkpoint
from llmlab.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class StoredWeight(NamedTuple):
    """A parameter's name and values in the checkpoint."""

    name: str
    values: np.ndarray


def locate_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Checkpoint tensors by the model's parameter name. Raises CheckpointError where one is missing or misshapen."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    found: dict[str, StoredWeight] = {}
    by_tensor: dict[int, StoredWeight] = {}  # a tied parameter has several names, of which the checkpoint holds one
    missing: dict[str, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names = (name, name.removeprefix(prefix), prefix + name)
        stored_name = next((n for n in names if n in checkpoint.weights), None)
        if stored_name is None:
            missing[name] = id(tensor)
            continue
        stored = checkpoint.weights[stored_name]
        if stored.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{stored.path}: '{stored_name}' has shape {list(stored.shape)}, the config asks for {list(tensor.shape)}"
            )
        found[name] = by_tensor[id(tensor)] = StoredWeight(stored_name, stored.map())
    for name, key in missing.items():
        if key not in by_tensor:
            raise CheckpointError(
                f"{checkpoint.folder}: no tensor '{name}' in it; the checkpoint is incomplete, of another model, or names it otherwise"
            )
        found[name] = by_tensor[key]
    used = {weight.name for weight in found.values()}
    unused = [
        n for n in checkpoint.weights if n not in used and not n.endswith(("inv_freq", "masked_bias", ".attn.bias"))
    ]
    if unused:
        warnings.warn(
            f"{checkpoint.folder}: {len(unused)} tensors have no place in the model and are left out, such as '{unused[0]}'",
            stacklevel=3,
        )
    return found
