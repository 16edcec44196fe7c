"""Shapes with symbols: what a rule written for numbers says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmlab.errors import InputError
from llmlab.graph.edit import Dim

_SIZES = (1009, 2003)  # primes, one for each time that a rule is asked


def evaluate_rule(name: str, rule: Callable[..., Sequence[Any]], shapes: Sequence[Sequence[Dim]]) -> list[list[Dim]]:
    """Output shapes of the operator `name` by its rule, asked at two sizes of every symbol.

    A size that is the same both times is that size, one that is a symbol's both times is the symbol, any other is
    unknown (None). Raises InputError where the rule fails or gives no shapes.
    """
    symbols: list[Dim] = list(dict.fromkeys(d for s in shapes for d in s if isinstance(d, str)))
    asked: list[list[tuple[int, ...]]] = []
    for size in _SIZES:
        unknown = iter(range(size + 2 * len(symbols), 1 << 30, 2))
        numbers = {s: size + 2 * i for i, s in enumerate(symbols)}
        given = [
            tuple(numbers[d] if isinstance(d, str) else next(unknown) if d is None else d for d in s) for s in shapes
        ]
        try:
            asked.append([tuple(int(d) for d in shape) for shape in rule(*given)])
        except Exception as problem:  # the rule is the user's
            text = " ".join(str(problem).split())
            shown = ", ".join(str(list(s)) for s in shapes)
            raise InputError(f"{name}: its shape() fails for {shown}: {type(problem).__name__}: {text}") from problem
    names = {(_SIZES[0] + 2 * i, _SIZES[1] + 2 * i): s for i, s in enumerate(symbols)}
    return [
        [a if a == b else names.get((a, b)) for a, b in zip(first, second, strict=True)]
        for first, second in zip(*asked, strict=True)
    ]
