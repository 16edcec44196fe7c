"""Sums, differences, products, quotients and comparisons of small whole numbers."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import vary
from llmlab.zoo.tasks.numbers import number_word
from llmlab.zoo.tasks.words import NAMES, THINGS

_SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
_ASK = (
    "What is {sum}?",
    "How much is {sum}?",
    "Calculate {sum}.",
    "Compute {sum}.",
    "Work out {sum}.",
    "Solve {sum}.",
    "Can you calculate {sum}?",
    "I need to know {sum}.",
    "What's {sum}?",
)
_GAIN = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "{name} had {a} {things} and found {b} more. How many {things} does {name} have?",
    "There are {a} {things} on the table. {name} adds {b}. How many {things} are there?",
)
_LOSE = (
    "{name} has {a} {things} and gives away {b}. How many {things} does {name} have now?",
    "{name} had {a} {things} but lost {b}. How many {things} are left?",
    "There are {a} {things} on the table. {name} takes {b}. How many {things} are left?",
)
_LARGER = ("Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?", "Is {a} or {b} the larger number?")
_SMALLER = ("Which is smaller, {a} or {b}?", "Which number is lower: {a} or {b}?", "Is {a} or {b} the smaller number?")


def _operands(rng: random.Random, operator: str, limit: int = 99) -> tuple[int, int, int]:
    """(a, b, result) of `a operator b`; quotients come out even."""
    if operator == "+":
        a, b = rng.randint(0, limit), rng.randint(0, limit)
        return a, b, a + b
    if operator == "-":
        a, b = rng.randint(0, limit), rng.randint(0, limit)
        if a < b and rng.random() < 0.9:  # mostly without a negative result
            a, b = b, a
        return a, b, a - b
    if operator == "*":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        return a, b, a * b
    a, b = rng.randint(0, 12), rng.randint(1, 12)
    return a * b, b, a


def solved(a: int, operator: str, b: int, result: int) -> str:
    """'3 + 4 = 7'."""
    return f"{a} {operator} {b} = {result}"


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One problem and its solution."""
    kind = rng.random()
    if kind < 0.15:
        a, b = rng.sample(range(100), 2)
        if rng.random() < 0.5:
            return [vary(rng, rng.choice(_LARGER).format(a=a, b=b))], f"{max(a, b)} is larger."
        return [vary(rng, rng.choice(_SMALLER).format(a=a, b=b))], f"{min(a, b)} is smaller."
    if kind < 0.35:
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        a, b = rng.randint(1, 60), rng.randint(1, 39)
        if rng.random() < 0.5:
            text = rng.choice(_GAIN).format(name=name, things=things, a=a, b=b)
            return [text], f"{solved(a, '+', b, a + b)}, so {a + b} {things}."
        a, b = max(a, b), min(a, b)
        text = rng.choice(_LOSE).format(name=name, things=things, a=a, b=b)
        return [text], f"{solved(a, '-', b, a - b)}, so {a - b} {things}."
    operator = rng.choice("++--**/")
    spoken = rng.random() < 0.4
    in_words = spoken and rng.random() < 0.4
    a, b, result = _operands(rng, operator, 20 if in_words else 99)
    if in_words:
        problem = f"{number_word(min(a, 100))} {_SPOKEN[operator]} {number_word(b)}" if a <= 100 else f"{a} / {b}"
    elif spoken:
        problem = f"{a} {_SPOKEN[operator]} {b}"
    else:
        problem = rng.choice(("{a} {o} {b}", "{a}{o}{b}")).format(a=a, o=operator, b=b)
    answer = solved(a, operator, b, result)
    if rng.random() < 0.15:
        return [problem + rng.choice(("", " =", " = ?", "?"))], answer
    return [vary(rng, rng.choice(_ASK).format(sum=problem))], answer
