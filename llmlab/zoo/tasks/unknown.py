"""Questions that nobody could answer from the prompt alone; the right reply is to say so."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.capitals import CAPITALS
from llmlab.zoo.tasks.common import made_up_word, vary
from llmlab.zoo.tasks.opposites import OPPOSITES
from llmlab.zoo.tasks.words import ANIMALS, COLORS, FOODS, HOBBIES, JOBS, NAMES, OBJECTS, PLACES, THINGS, WORDS

ANSWER = "I don't know."

_TEMPLATES = (
    "What will the weather be in {place} {when}?",
    "Will it rain in {place} {when}?",
    "How cold is it in {place} right now?",
    "Who won the {hobby} match in {place} {past}?",
    "Who will win the {hobby} game {when}?",
    "What is {name}'s phone number?",
    "What did {name} eat {past}?",
    "Where did {name} put the {object}?",
    "Where is {name} right now?",
    "Where does {name} live?",
    "How old is {name}?",
    "What is the name of {name}'s {animal}?",
    "When is {name}'s birthday?",
    "How tall is the {job} next door?",
    "What is the code of the {color} {object}?",
    "What am I thinking about?",
    "What is in my {object}?",
    "How many {things} are in my {object}?",
    "How much does {food} cost in {place}?",
    "What time is it in {place}?",
    "What time is it?",
    "What day is it {when}?",
    "Did {name} call {past}?",
    "Why is {name} late {when}?",
    "What is my password?",
    "What is my {animal}'s name?",
    "Which number will win the lottery {when}?",
    "What will {name} do {when}?",
    "Who is the best {job} in {place}?",
    "How many people live in {place}?",
    "Who wrote the book about the {animal}?",
    "Who is the president of {place}?",
    "What is the meaning of {word}?",
    "Explain {word} to me.",
    "Write a poem about {word}.",
    "Tell me a story about a {animal}.",
    "Tell me a joke about a {job}.",
    "What is the history of {place}?",
    "Write a program for my {object}.",
    "How do I cook {food}?",
    "How do I repair a {object}?",
    "Why is the {word} {color}?",
    "When was {place} founded?",
    "Who invented the {word}?",
    "What does {made} mean?",
    "Who is {made_name}?",
    "What is {made}?",
    "What is the capital of {made_name}?",
    "What's the capital of {made_name}?",
    "Which city is the capital of {made_name}?",
    "Where is {made_name}?",
    "What is the opposite of {made}?",
    "Which country has {made_name} as its capital?",
    "How far is it from {place} to {made_name}?",
    "What is the tallest {word}?",
    "How does a {object} work?",
    "Who painted the {word}?",
    "What is the best {food} in {place}?",
    "Should I buy a {color} {object}?",
    "How long does a {animal} live?",
    "Why do people like {hobby}?",
    "What happened in {place} {past}?",
    "What does the {job} earn?",
    "Is {food} healthy?",
    "Summarize the news from {place}.",
    "Write an essay about {hobby}.",
    "Who discovered {made_name}?",
    "Recommend a book about {word}.",
)
_WHEN = ("tomorrow", "next week", "tonight", "next year", "on Monday", "on Friday", "next month", "this weekend")
_PAST = ("yesterday", "last night", "last week", "last year", "on Sunday", "this morning", "last month")
_REAL = {word.casefold() for word in (*OPPOSITES, *CAPITALS, *CAPITALS.values(), *WORDS)}


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One question without a known answer."""
    made = made_up_word(rng, rng.choice((2, 2, 3)))
    while made in _REAL:  # chance builds 'mali' and 'hero' too
        made = made_up_word(rng, 3)
    text = rng.choice(_TEMPLATES).format(
        place=rng.choice(PLACES),
        name=rng.choice(NAMES),
        when=rng.choice(_WHEN),
        past=rng.choice(_PAST),
        hobby=rng.choice(HOBBIES),
        object=rng.choice(OBJECTS),
        animal=rng.choice(ANIMALS),
        job=rng.choice(JOBS),
        color=rng.choice(COLORS),
        things=rng.choice(THINGS),
        food=rng.choice(FOODS),
        word=rng.choice(WORDS),
        made=made,
        made_name=made.capitalize(),
    )
    return [vary(rng, text)], ANSWER
