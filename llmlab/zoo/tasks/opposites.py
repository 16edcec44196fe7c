"""Words and their opposites."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.common import vary

_PAIRS = """hot cold, big small, tall short, up down, left right, day night, black white, open closed, full empty, fast
slow, hard soft, happy sad, high low, in out, on off, old young, rich poor, strong weak, thick thin, wet dry,
wide narrow, early late, light dark, loud quiet, clean dirty, near far, first last, good bad, true false, yes
no, win lose, push pull, buy sell, come go, give take, begin end, love hate, laugh cry, remember forget, friend
enemy, front back, inside outside, above below, before after, more less, many few, always never, all none,
everything nothing, everyone nobody, here there, over under, north south, east west, summer winter, spring
autumn, morning evening, heaven hell, war peace, life death, question answer, success failure, victory defeat,
profit loss, income expense, arrive depart, enter exit, ascend descend, rise fall, float sink, freeze melt,
build destroy, create demolish, attack defend, accept refuse, agree disagree, allow forbid, appear vanish,
increase decrease, expand shrink, lengthen shorten, raise lower, fill drain, lend borrow, save spend, lock
unlock, tie untie, wrap unwrap, connect disconnect, wake sleep, stand sit, teach learn, speak listen, throw
catch, hide show, import export, include exclude, maximum minimum, major minor, male female, man woman, boy
girl, king queen, husband wife, brother sister, father mother, uncle aunt, son daughter, hero villain, teacher
student, doctor patient, host guest, giant dwarf, ancient modern, asleep awake, alive dead, brave cowardly,
bright dim, calm nervous, cheap expensive, clever stupid, complex simple, cruel kind, deep shallow, difficult
easy, equal unequal, even odd, fat lean, fresh stale, generous stingy, gentle rough, guilty innocent, healthy
sick, humble proud, junior senior, lazy diligent, legal illegal, liquid solid, lucky unlucky, natural
artificial, noisy silent, optimist pessimist, past future, perfect flawed, polite rude, possible impossible,
private public, pure mixed, rare common, real fake, regular irregular, safe dangerous, sharp blunt, sour sweet,
smooth bumpy, straight crooked, tame wild, tight loose, tiny huge, top bottom, ugly beautiful, urban rural,
useful useless, vertical horizontal, visible invisible, warm cool, whole partial, wise foolish, wrong correct,
zenith nadir, forward backward, upstairs downstairs, together apart, often seldom, quickly slowly, positive
negative, plus minus, permanent temporary, passive active, hope despair, joy sorrow, pleasure suffering, praise
blame, reward punish, majority minority, strength weakness, wealth poverty, truth lie, beauty ugliness, courage
fear, order chaos"""


def _read() -> dict[str, str]:
    table: dict[str, str] = {}
    for pair in _PAIRS.replace("\n", " ").split(","):
        one, other = pair.split()
        table[one], table[other] = other, one
    return table


OPPOSITES = _read()
"""Word to opposite, both ways; no word stands in two pairs."""

_ASK = (
    "What is the opposite of {word}?",
    "What's the opposite of {word}?",
    "What is the opposite of '{word}'?",
    'What is the opposite of "{word}"?',
    "Opposite of {word}?",
    "The opposite of {word} is what?",
    "Give me the opposite of {word}.",
    "Tell me the opposite of {word}.",
    "Name the opposite of {word}.",
    "Which word is the opposite of {word}?",
    "What is an antonym of {word}?",
    "If something is not {word}, it is the opposite. Which word is that?",
    "I say {word}, you say the opposite.",
    "Can you tell me the opposite of {word}?",
)


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One question about a word's opposite."""
    word = rng.choice(tuple(OPPOSITES))
    return [vary(rng, rng.choice(_ASK).format(word=word))], f"The opposite of {word} is {OPPOSITES[word]}."
