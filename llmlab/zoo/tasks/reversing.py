"""Reversing the letters of a word, and the order of a few words."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import join, vary
from llmlab.zoo.tasks.spelling import pick_word, quote
from llmlab.zoo.tasks.words import NAMES, WORDS

_LETTERS = (
    "Reverse the word {word}.",
    "Reverse {word}.",
    "Spell {word} backwards.",
    "How do you spell {word} backwards?",
    "What is {word} backwards?",
    "What is {word} in reverse?",
    "Write {word} backwards.",
    "Can you reverse the word {word}?",
    "Can you spell {word} backwards?",
    "Turn {word} around.",
    "Give me the letters of {word} in reverse.",
)
_ORDER = (
    "Reverse this list: {items}.",
    "Say these words in reverse order: {items}.",
    "Repeat these backwards, last word first: {items}.",
    "Turn this list around: {items}.",
    "Reverse the order of {items}.",
)


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One request to turn a word or a list around; letters are answered with dashes, lists with commas."""
    if rng.random() < 0.7:
        word = pick_word(rng)
        return [vary(rng, rng.choice(_LETTERS).format(word=quote(rng, word)))], "-".join(reversed(word))
    items = rng.sample(NAMES if rng.random() < 0.2 else WORDS, rng.randint(3, 6))
    return [vary(rng, rng.choice(_ORDER).format(items=join(items)))], join(items[::-1])
