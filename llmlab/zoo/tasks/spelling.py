"""Spelling words letter by letter."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import made_up_word, vary
from llmlab.zoo.tasks.words import NAMES, PLACES, WORDS

_ASK = (
    "How do you spell {word}?",
    "How do I spell {word}?",
    "How is {word} spelled?",
    "Spell {word}.",
    "Spell the word {word}.",
    "Can you spell {word}?",
    "Can you spell the word {word} for me?",
    "Please spell {word}.",
    "Spell out {word}.",
    "Spell {word} letter by letter.",
    "What are the letters of {word}?",
    "I can't spell {word}.",
)


def pick_word(rng: random.Random) -> str:
    """A word to take apart: mostly a real one, else a made-up one, so that letters are learned and not only words."""
    kind = rng.random()
    if kind < 0.55:
        word = rng.choice(WORDS)
    elif kind < 0.65:
        word = rng.choice((*NAMES, *PLACES))
    else:
        word = made_up_word(rng, rng.choice((1, 1, 2, 2, 2, 3)))
    return word if len(word) > 1 else word + "at"


def quote(rng: random.Random, word: str) -> str:
    """The word bare or in quotes."""
    return rng.choice(("{}", "{}", "'{}'", '"{}"')).format(word)


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One request to spell a word; the answer is its letters with dashes between them."""
    word = pick_word(rng)
    return [vary(rng, rng.choice(_ASK).format(word=quote(rng, word)))], "-".join(word)
