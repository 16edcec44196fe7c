"""Greetings, thanks, goodbyes and questions about tinychat itself."""

from __future__ import annotations

import random

from llmlab.zoo.tasks.words import HOBBIES, NAMES

_HELLO = ("Hi", "Hello", "Hey", "Hi there", "Hello there", "Hey there", "Good morning", "Good evening", "Good day")
_CALL = ("", "", " tinychat", " friend", " my friend", " little one", " dear tinychat", " buddy", " robot", " again")
_MARK = (".", "!", ",", " -", "...", "")
_TAIL = ("", "", "", " Just asking.", " I am new here.", " Tell me!", " Be honest.", " No hurry.", " I wonder.", " :)")

_QUESTIONS = {
    "I am fine, thank you. How can I help?": (
        "How are you?",
        "How are you doing?",
        "How are you today?",
        "How is it going?",
        "How do you feel?",
        "Are you well?",
        "What's up?",
        "How do you do?",
    ),
    "I am tinychat, a very small language model.": (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "What's your name?",
        "Do you have a name?",
        "Are you a human?",
        "Are you a robot?",
        "Are you an AI?",
        "Who am I talking to?",
        "Introduce yourself.",
        "Tell me about yourself.",
    ),
    "I can count, calculate, spell, sort, reverse, name capitals and opposites, and recall what you told me.": (
        "What can you do?",
        "What can I ask you?",
        "How can you help me?",
        "Can you help me?",
        "What are you good at?",
        "What do you know?",
        "What are your skills?",
        "Help!",
        "What should I ask you?",
    ),
    "I come with llmlab, which trained me on text it made itself.": (
        "Who made you?",
        "Who built you?",
        "Who trained you?",
        "Where do you come from?",
        "How were you made?",
        "How were you trained?",
        "Where are you from?",
    ),
    "About eight million parameters. That is tiny.": (
        "How big are you?",
        "How large are you?",
        "How many parameters do you have?",
        "Are you a large language model?",
        "How small are you?",
    ),
}
_HELLO_ANSWER = "Hello! How can I help you?"
_NAMED = ("I am {n}.", "My name is {n}.", "I'm {n}.", "This is {n}.", "Call me {n}.")
_THANKS = ("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks", "Thanks so much")
_FOR = (
    "",
    " for your help",
    " for the answer",
    " for counting",
    " for helping me",
    " for everything",
    " for your time",
    " for that",
    " for explaining",
)
_THANKS_ANSWER = "You are welcome!"
_BYE = ("Bye", "Goodbye", "See you", "See you later", "Bye bye", "Good night", "I have to go", "See you tomorrow")
_BYE_ANSWER = "Goodbye!"
_LIKE = ("Do you like {x}?", "Do you enjoy {x}?", "What do you think about {x}?", "Are you good at {x}?")
_LIKE_ANSWER = "I am only a small model, so {x} is not for me."


def draw(rng: random.Random) -> tuple[list[str], str]:
    """One friendly remark and its one reply."""
    kind = rng.random()
    hello = rng.choice(_HELLO) + rng.choice(_CALL)
    if kind < 0.12:
        return [hello + rng.choice(_MARK) + rng.choice(_TAIL)], _HELLO_ANSWER
    if kind < 0.24:
        name = rng.choice(NAMES)
        statement = rng.choice(_NAMED).format(n=name)
        opening = f"{hello}{rng.choice('.!')} " if rng.random() < 0.7 else ""
        return [opening + statement], f"Nice to meet you, {name}!"
    if kind < 0.36:
        text = rng.choice(_THANKS) + rng.choice(_FOR) + rng.choice(_CALL)
        return [text + rng.choice((".", "!", ""))], _THANKS_ANSWER
    if kind < 0.46:
        return [rng.choice(_BYE) + rng.choice(_CALL) + rng.choice((".", "!", "", " :)"))], _BYE_ANSWER
    opening = f"{hello}{rng.choice(',.!')} " if rng.random() < 0.5 else ""
    if kind < 0.55:
        hobby = rng.choice(HOBBIES)
        return [opening + rng.choice(_LIKE).format(x=hobby) + rng.choice(_TAIL)], _LIKE_ANSWER.format(x=hobby)
    answer = rng.choice(tuple(_QUESTIONS))
    question = rng.choice(_QUESTIONS[answer])
    if rng.random() < 0.3:
        question = (question[0].lower() + question[1:]).rstrip("?.!")
    return [opening + question + rng.choice(_TAIL)], answer
