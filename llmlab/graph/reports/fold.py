"""Layers that are alike, said once: `model.layers.0–29.self_attn/Attention (30×)`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The first number in a dotted path: `model.layers.3` of `model.layers.3.mlp.experts.5/MatMul`, and `kv_cache.3`.
_NUMBERED = re.compile(r"(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.(\d{1,6})(?![\w-])")
_OFFSET = re.compile(r"\.\{([+-]\d+)\}")
_SHOWN_RANGES = 4


@dataclass(frozen=True)
class Folded:
    """Rows that differ in the number of their layer alone."""

    texts: tuple[str, ...]
    """The row, with the numbers of all layers where one row had the number of its own."""
    count: int
    first: int = 0
    """Which of the rows, from 0, was the first of them."""

    @property
    def times(self) -> str:
        """` (30×)`, or nothing where it is one."""
        return f" ({self.count}×)" if self.count > 1 else ""


def layer_of(node_name: str) -> str:
    """The layer that a node belongs to: `model.layers.3` of `model.layers.3.mlp/MatMul`, else its module."""
    module = node_name.partition("/")[0]
    layer = _NUMBERED.match(module)
    return layer.group() if layer else module


def block_of(node_name: str) -> str:
    """The part of a layer that a node belongs to: `model.layers.3.mlp` of `model.layers.3.mlp.up_proj/MatMul`."""
    module, layer = node_name.partition("/")[0], layer_of(node_name)
    inside = module[len(layer) + 1 :].partition(".")[0]
    return f"{layer}.{inside}" if inside else layer


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [
        (int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in re.split(r"([0-9]{1,6})", text)
    ]


def fold(rows: Iterable[tuple[str, ...]]) -> list[Folded]:
    """Rows of text, those that are alike but for the number of the layer in their first text as one."""
    groups: dict[tuple[str, ...], list[int]] = {}
    first: dict[tuple[str, ...], int] = {}
    for at, row in enumerate(rows):
        layer = _NUMBERED.search(row[0])
        number = int(layer.group(2)) if layer else 0
        alike = tuple(_relative(text, number) for text in row) if layer else row
        groups.setdefault(alike, []).append(number)
        first.setdefault(alike, at)
    return [
        Folded(tuple(_absolute(text, sorted(set(numbers))) for text in alike), len(numbers), first[alike])
        for alike, numbers in groups.items()
    ]


def _relative(text: str, number: int) -> str:
    return _NUMBERED.sub(lambda m: f"{m[1]}.{{{int(m[2]) - number:+d}}}", text)


def _absolute(text: str, numbers: Sequence[int]) -> str:
    return _OFFSET.sub(lambda m: "." + ranges([n + int(m[1]) for n in numbers]), text)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: `0–3, 7`, or `0, 2, 4, …, 28` where there are many."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    texts = ["–".join(map(str, part)) for part in parts]
    if len(texts) > _SHOWN_RANGES:
        texts = [*texts[: _SHOWN_RANGES - 1], "…", texts[-1]]
    return ", ".join(texts)
