"""A checkpoint's tensors in the places of a model's parameters."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, NamedTuple

from llmlab.checkpoint import Checkpoint
from llmlab.errors import CheckpointError, UnsupportedModelError
from llmlab.graph.sources.conversion import NotLazy, Shapes, Source, convert, sources
from llmlab.graph.store.lazy import Values

if TYPE_CHECKING:
    import torch

_DERIVED = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias")  # buffers that old checkpoints hold


class StoredWeight(NamedTuple):
    """A parameter's name and values: the checkpoint's own, or the parameter's where it has to be put together."""

    name: str
    values: Values


def locate_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Checkpoint tensors by the model's parameter name. Raises CheckpointError where one is missing or misshapen."""
    parameters = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    found: dict[str, StoredWeight] = {}
    used: set[str] = set()
    for name, source in sources(model, checkpoint.weights, shapes).items():
        used.update(source.tensors)
        found |= _stored(name, source, checkpoint, shapes, getattr(model, "config", None))
    tied = {id(parameters[name]): weight for name, weight in found.items()}
    for name, tensor in parameters.items():
        if name in found:
            continue
        if id(tensor) not in tied:
            raise CheckpointError(
                f"{checkpoint.folder}: no tensor '{name}' in it; the checkpoint is incomplete, of another model, or names it otherwise"
            )
        found[name] = tied[id(tensor)]
    derived = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unused = [n for n in checkpoint.weights if n not in used and not n.endswith(_DERIVED)]
    unused = [n for n in unused if not any(p.search(n) for p in derived)]
    if unused:
        warnings.warn(
            f"{checkpoint.folder}: {len(unused)} tensors have no place in the model and are left out, such as '{unused[0]}'",
            stacklevel=3,
        )
    return found


def _stored(
    name: str, source: Source, checkpoint: Checkpoint, shapes: Shapes, config: object
) -> dict[str, StoredWeight]:
    """What the checkpoint holds for parameter `name`, and for those that are made of the same tensors."""
    first = source.tensors[0]
    where = checkpoint.weights[first].path
    if source.converter is None:
        made = {name: StoredWeight(first, checkpoint.weights[first].map())}
    else:
        try:
            values = convert(name, source, lambda n: checkpoint.weights[n].map(), shapes, config)
        except NotLazy as problem:
            raise UnsupportedModelError(f"{where}: '{name}' can't be read: {problem}") from problem
        except (ValueError, IndexError) as problem:
            raise CheckpointError(f"{where}: '{first}' and its like don't make '{name}': {problem}") from problem
        made = {n: StoredWeight(n, v) for n, v in values.items()}
    for parameter, weight in made.items():
        if parameter not in shapes:
            raise CheckpointError(f"{where}: '{first}' is to become '{parameter}', which the model doesn't have")
        if tuple(weight.values.shape) != shapes[parameter]:
            raise CheckpointError(
                f"{where}: '{weight.name}' has shape {list(weight.values.shape)}, the config asks for {list(shapes[parameter])}"
            )
    return made
