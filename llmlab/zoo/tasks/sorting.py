"""Sorting short lists of numbers by size and of words by alphabet."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import join, vary
from llmlab.zoo.tasks.words import NAMES, WORDS

_UP = (
    "Sort these numbers: {items}.",
    "Sort {items}.",
    "Put these numbers in order: {items}.",
    "Sort from smallest to largest: {items}.",
    "Can you sort these numbers for me: {items}?",
    "Order these numbers from low to high: {items}.",
    "Arrange {items} in ascending order.",
)
_DOWN = (
    "Sort from largest to smallest: {items}.",
    "Sort these numbers in descending order: {items}.",
    "Order these numbers from high to low: {items}.",
    "Arrange {items} in descending order.",
)
_ALPHABET = (
    "Sort these words: {items}.",
    "Sort alphabetically: {items}.",
    "Put these words in alphabetical order: {items}.",
    "Sort these words by alphabet: {items}.",
    "Can you put these in alphabetical order: {items}?",
    "Arrange {items} alphabetically.",
)


def _words(rng: random.Random) -> list[str]:
    """Three to five words that differ in their first letters, so that the alphabet alone decides."""
    pool, length = (NAMES if rng.random() < 0.25 else WORDS), rng.randint(3, 5)
    by_letter: dict[str, str] = {}
    while len(by_letter) < length:
        word = rng.choice(pool)
        by_letter.setdefault(word[0], word)
    return list(by_letter.values())


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One list to sort, and the sorted list."""
    kind = rng.random()
    if kind < 0.4:
        words = _words(rng)
        return [vary(rng, rng.choice(_ALPHABET).format(items=join(words)))], join(sorted(words))
    numbers = rng.sample(range(10 if rng.random() < 0.15 else 100), rng.randint(3, 6))
    down = kind > 0.75
    template = rng.choice(_DOWN if down else _UP)
    return [vary(rng, template.format(items=join(numbers)))], join(sorted(numbers, reverse=down))
