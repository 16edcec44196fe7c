"""What transformers would do to a checkpoint's tensors while loading them, read from its own declarations, done lazily.

transformers 5 renames tensors, stacks experts and splits or joins projections on load (`conversion_mapping.py` there). The
declarations are followed; the operations are computed when a tensor is written (`lazy.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmlab.graph.store.lazy import Joined, Rearranged, Stacked, Values, dealt, part, swapped

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Source:
    """The checkpoint tensors that a parameter is made of, by the pattern they matched, and what is to be done to them."""

    names: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None  # transformers' WeightConverter; None where the tensor only changes its name

    @property
    def tensors(self) -> list[str]:
        return [name for names in self.names.values() for name in names]


def sources(model: torch.nn.Module, stored: Mapping[str, Any], shapes: Shapes) -> dict[str, Source]:
    """The sources of each parameter in `shapes` among the names in `stored`, as transformers would find them.

    A converter with several results is listed under its first.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, Source] = {}
    for key in sorted(stored, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, shapes)
        if name not in shapes and key in shapes:
            name, pattern = key, None
        if name not in shapes:
            continue
        source = found.setdefault(name, Source(converter=by_pattern.get(pattern)))
        if pattern is None:
            found[name] = Source({key: [key]})
        elif source.converter is not None:
            source.names.setdefault(pattern, []).append(key)
    return found


class NotLazy(Exception):
    """An operation that can't be done lazily, in one line."""


@dataclass(frozen=True)
class _Context:
    name: str
    targets: list[str]
    patterns: list[str]
    shapes: Shapes
    config: Any

    def full(self, target: str) -> str:
        return self.name.replace(self.targets[0], target)


def convert(
    name: str, source: Source, stored: Callable[[str], Values], shapes: Shapes, config: Any
) -> dict[str, Values]:
    """The parameters that the converter of `source` makes, by full name.

    Raises NotLazy for what isn't known here, ValueError where the tensors' shapes don't fit together.
    """
    converter = source.converter
    context = _Context(name, list(converter.target_patterns), list(converter.source_patterns), shapes, config)
    tensors: dict[str, list[Values]] = {p: [stored(n) for n in names] for p, names in source.names.items()}
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in _OPERATIONS:
            raise NotLazy(f"transformers makes it with {kind}, which isn't known here")
        tensors = _OPERATIONS[kind](operation, tensors, context)
    if len(context.targets) == 1:
        ((values, *more),) = tensors.values()
        if more:
            raise NotLazy(f"{len(more) + 1} tensors are left of it, expected one")
        return {name: values}
    return {context.full(target): values[0] for target, values in tensors.items()}


Tensors = dict[str, list[Values]]


def _only(tensors: Tensors) -> Values:
    if len(tensors) != 1 or len(values := next(iter(tensors.values()))) != 1:
        raise NotLazy("it is made of several tensors where one is expected")
    return values[0]


def _stack(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    return {pattern: [Stacked(values, operation.dim)] for pattern, values in tensors.items()}


def _concatenate(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    if absent := [p for p in context.patterns if p not in tensors]:
        raise ValueError(f"nothing in the checkpoint matches '{absent[0]}'")
    return {context.targets[0]: [Joined([v for p in context.patterns for v in tensors[p]], operation.dim)]}


def _chunk(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    if operation.num_shards_attribute is not None:
        raise NotLazy("it is cut into a number of pieces that the config decides")
    whole = _only(tensors)
    length = whole.shape[operation.dim]
    step = -(-length // len(context.targets))
    return _cut(whole, operation.dim, [min(step, length - step * i) for i in range(len(context.targets))], context)


def _split(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    sizes = [context.shapes[context.full(target)][operation.dim] for target in context.targets]
    return _cut(_only(tensors), operation.dim, sizes, context)


def _cut(whole: Values, axis: int, sizes: list[int], context: _Context) -> Tensors:
    if sum(sizes) != whole.shape[axis]:
        raise ValueError(f"{list(whole.shape)} can't be cut into {sizes} along axis {axis}")
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [part(whole, axis, begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
    return {target: [piece] for target, piece in zip(context.targets, pieces, strict=True)}


def _transpose(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    whole = _only(tensors)
    if operation.check_dims and tuple(whole.shape) == tuple(context.shapes[context.name]):
        return tensors
    return {pattern: [swapped(whole, operation.dim0, operation.dim1)] for pattern in tensors}


def _interleave(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    whole = _only(tensors)
    groups = whole.shape[operation.dim] // 2 if operation.inverse else 2
    return {pattern: [dealt(whole, operation.dim, groups)] for pattern in tensors}


def _permute_for_rope(operation: Any, tensors: Tensors, context: _Context) -> Tensors:
    """Pairs of rows that RoPE turns together, from neighbours to halves of a head (or back)."""
    config = getattr(context.config, operation.subconfig_key or "", context.config)
    heads, names = getattr(config, "num_attention_heads", 1), operation.permute_layer_names

    def permuted(values: Values) -> Values:
        shape = tuple(values.shape)
        half = shape[0] // heads // 2
        split = (heads, *((2, half) if operation.inverse else (half, 2)), *shape[1:])
        return Rearranged(values, lambda array: array.reshape(split).swapaxes(1, 2).reshape(shape), shape)

    return {
        pattern: [permuted(v) for v in values] if names is None or any(n in pattern for n in names) else values
        for pattern, values in tensors.items()
    }


_OPERATIONS: dict[str, Callable[[Any, Tensors, _Context], Tensors]] = {
    "MergeModulelist": _stack,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "PermuteForRope": _permute_for_rope,
}
