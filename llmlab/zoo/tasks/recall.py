"""Finding one fact or one key's value in a long prompt of facts that look alike: up to about 900 tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

from llmlab.zoo.tasks.words import ANIMALS, COLORS, FOODS, HOBBIES, JOBS, NAMES, OBJECTS, PLACES, THINGS, WORDS

MAX_CHARACTERS = 2000
"""Longest list of facts; with the question and the template this stays under 1,000 tokens."""

Fact = tuple[str, str]
"""(sentence that states it, question for it)."""

_INTRO = ("Read these notes.", "Here are some facts.", "Please remember the following.", "These are my notes:", "")
_OUTRO = ("", "", "Now my question:", "Tell me:", "One question:")
_FILLER = (
    "The weather was fine that day.",
    "Nothing else happened in the morning.",
    "It was a long week for everyone.",
    "The meeting took an hour.",
    "Lunch was late again.",
    "The train was on time.",
    "Somebody left the window open.",
    "That is all about it.",
    "The rest is not important.",
    "We talked about the holidays.",
)


def _code(rng: random.Random) -> str:
    return str(rng.randint(1000, 9999)) if rng.random() < 0.7 else str(rng.randint(10, 999))


def _person(rng: random.Random) -> Fact:
    """A person has one place, job, pet, dish or hobby; the kind is part of the question."""
    name = rng.choice(NAMES)
    value_of: dict[str, tuple[tuple[str, ...], str, str]] = {
        "city": (PLACES, "{n} lives in {v}.", "Where does {n} live?"),
        "job": (JOBS, "{n} works as a {v}.", "What does {n} work as?"),
        "pet": (ANIMALS, "{n} has a pet {v}.", "Which pet does {n} have?"),
        "dish": (FOODS, "{n} likes to eat {v}.", "What does {n} like to eat?"),
        "hobby": (HOBBIES, "{n}'s hobby is {v}.", "What is {n}'s hobby?"),
        "color": (COLORS, "{n}'s favorite color is {v}.", "What is {n}'s favorite color?"),
    }
    values, statement, question = value_of[rng.choice(tuple(value_of))]
    return statement.format(n=name, v=rng.choice(values)), question.format(n=name)


def _place_code(rng: random.Random) -> Fact:
    what, code = f"{rng.choice(COLORS)} {rng.choice(OBJECTS)}", _code(rng)
    return f"The code of the {what} is {code}.", f"What is the code of the {what}?"


def _number_of(rng: random.Random) -> Fact:
    name, things, count = rng.choice(NAMES), rng.choice(THINGS), str(rng.randint(2, 99))
    return f"{name} has {count} {things}.", f"How many {things} does {name} have?"


def _key_value(rng: random.Random) -> Fact:
    key = rng.choice(WORDS) + rng.choice(("", f"-{rng.randint(1, 99)}"))
    value = _code(rng) if rng.random() < 0.6 else rng.choice(WORDS)
    return f"{key}: {value}", f"What is the value of {key}?"


_SENTENCES: tuple[Callable[[random.Random], Fact], ...] = (_person, _place_code, _number_of)


def _facts(rng: random.Random, table: bool, length: int) -> list[Fact]:
    """Facts with no two on the same question, `length` characters together."""
    makers = (_key_value,) if table else _SENTENCES if rng.random() < 0.5 else (rng.choice(_SENTENCES),)
    by_question: dict[str, Fact] = {}
    used = 0
    while used < length or len(by_question) < 3:
        fact = rng.choice(makers)(rng)
        if fact[1] not in by_question:
            by_question[fact[1]] = fact
            used += len(fact[0]) + 1
    return list(by_question.values())


def draw(rng: random.Random) -> tuple[list[str], str]:
    """Notes or a table of keys, then a question; the answer is the line that states what it asks for."""
    table = rng.random() < 0.35
    # as many short lists as long ones on a logarithmic scale, plus a share of really long ones
    length = int(80 * (MAX_CHARACTERS / 80) ** (rng.random() if rng.random() < 0.7 else rng.uniform(0.85, 1)))
    length = min(length, int(MAX_CHARACTERS * 0.7)) if table else length  # keys and digits take more tokens
    facts = _facts(rng, table, length)
    lines = [fact[0] for fact in facts]
    if not table and rng.random() < 0.4:
        for _ in range(max(1, len(lines) // 8)):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(_FILLER))
    answer, question = rng.choice(facts)
    body = ("\n" if table else rng.choice(("\n", " ", " "))).join(lines)
    intro, outro = rng.choice(_INTRO), rng.choice(_OUTRO)
    return ["\n".join(part for part in (intro, body, f"{outro} {question}".strip()) if part)], answer
