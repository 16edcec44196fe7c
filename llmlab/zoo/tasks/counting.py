"""Counting up and down and naming numbers in five languages."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import join, vary
from llmlab.zoo.tasks.numbers import LANGUAGES, number_word

_UP = (
    "How do I count to {n} in {language}?",
    "How do you count to {n} in {language}?",
    "Count to {n} in {language}.",
    "Count up to {n} in {language}.",
    "Can you count to {n} in {language}?",
    "Please count to {n} in {language}.",
    "Count from one to {n} in {language}.",
    "Show me how to count to {n} in {language}.",
    "I want to count to {n} in {language}.",
    "In {language}, count to {n}.",
    "Teach me to count to {n} in {language}.",
    "What are the numbers from 1 to {n} in {language}?",
    "List the numbers up to {n} in {language}.",
)
_UP_PLAIN = ("Count to {n}.", "Can you count to {n}?", "How do I count to {n}?", "Please count up to {n}.")
_UP_NATIVE = {
    "English": "Count to {n}, please.",
    "French": "Compte jusqu'à {n}.",
    "German": "Zähle bis {n}.",
    "Spanish": "Cuenta hasta {n}.",
    "Italian": "Conta fino a {n}.",
}
_RANGE = (
    "Count from {m} to {n} in {language}.",
    "How do I count from {m} to {n} in {language}?",
    "Can you count from {m} to {n} in {language}?",
    "What are the numbers from {m} to {n} in {language}?",
)
_DOWN = (
    "Count down from {n} in {language}.",
    "Count backwards from {n} in {language}.",
    "How do I count down from {n} in {language}?",
    "Can you count backwards from {n} to one in {language}?",
)
_NAME = (
    "How do you say {n} in {language}?",
    "What is {n} in {language}?",
    "How do I write {n} in {language} words?",
    "What is the {language} word for {n}?",
    "Translate {n} to {language}.",
    "Say {n} in {language}.",
)
_NEXT = ("What comes after {word} in {language}?", "In {language}, which number follows {word}?")


def count(first: int, last: int, language: str) -> str:
    """'un, deux, trois.': the numbers from `first` to `last`, in either direction."""
    step = 1 if last >= first else -1
    return join([number_word(n, language) for n in range(first, last + step, step)]) + "."


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One request to count, and the numbers."""
    language = rng.choice(LANGUAGES)
    kind = rng.random()
    n = rng.randint(3, 12) if rng.random() < 0.5 else rng.randint(3, 30)
    shown = number_word(n) if rng.random() < 0.5 else str(n)
    if kind < 0.45:
        return [vary(rng, rng.choice(_UP).format(n=shown, language=language))], count(1, n, language)
    if kind < 0.50:
        return [vary(rng, rng.choice(_UP_PLAIN).format(n=shown))], count(1, n, "English")
    if kind < 0.57:
        native = number_word(n, language) if rng.random() < 0.5 else str(n)
        return [vary(rng, _UP_NATIVE[language].format(n=native))], count(1, n, language)
    if kind < 0.70:
        m = rng.randint(2, 20)
        n = m + rng.randint(2, 10)
        first, last = (number_word(m), number_word(n)) if rng.random() < 0.5 else (str(m), str(n))
        return [vary(rng, rng.choice(_RANGE).format(m=first, n=last, language=language))], count(m, n, language)
    if kind < 0.82:
        n = rng.randint(3, 20)
        shown = number_word(n) if rng.random() < 0.5 else str(n)
        return [vary(rng, rng.choice(_DOWN).format(n=shown, language=language))], count(n, 1, language)
    n = rng.randint(0, 99)
    if kind < 0.95:
        shown = number_word(n) if rng.random() < 0.3 else str(n)
        return [vary(rng, rng.choice(_NAME).format(n=shown, language=language))], number_word(n, language) + "."
    word = number_word(n, language)
    return [vary(rng, rng.choice(_NEXT).format(word=word, language=language))], number_word(n + 1, language) + "."
