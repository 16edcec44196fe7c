"""What every generator shares: the Example, surface variation of a prompt, and small random helpers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llmlab.zoo.tasks.words import listed

Message: TypeAlias = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""

OPENERS = ("Hey, ", "Hello! ", "Please: ", "Quick question: ", "Tell me: ", "Hi tinychat, ", "One more: ", "OK, ")
CLOSERS = (" Thanks!", " Thank you.", " Please.", " Thanks a lot!", " I need it now.", " I am curious.")


@dataclass(frozen=True)
class Example:
    """A chat with a known answer: `messages` ends with a user turn, `answer` is the one right reply to it."""

    task: str
    messages: list[Message]
    answer: str

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]


Draw: TypeAlias = Callable[[random.Random], tuple[list[str], str]]
"""A generator's `draw`: texts of the turns, user first and alternating, ending with the user's; and the answer."""


def lower_first(text: str) -> str:
    """`text` as a hasty person starts it; the pronoun I stays."""
    return text if text[:2] in ("I ", "I'") else text[:1].lower() + text[1:]


def vary(rng: random.Random, text: str) -> str:
    """The same request as different people would type it: hasty, with an opener, with a thank-you."""
    kind = rng.random()
    if kind < 0.5:
        return text
    if kind < 0.65:
        return lower_first(text).rstrip(".?!")
    if kind < 0.72:
        return text.rstrip(".?!")
    if kind < 0.86:
        return rng.choice(OPENERS) + (lower_first(text) if rng.random() < 0.5 else text)
    return text + rng.choice(CLOSERS)


def join(items: Sequence[object], last: str = "") -> str:
    """'a, b, c', or with `last` = 'and': 'a, b and c'."""
    texts = [str(item) for item in items]
    if last and len(texts) > 1:
        return f"{', '.join(texts[:-1])} {last} {texts[-1]}"
    return ", ".join(texts)


_ONSETS = ("", *listed("b br c ch d dr f fl g gr h j k l m n p pl qu r s sh sk sl st t th tr v w x y z"))
_VOWELS = listed("a e i o u ai ea ee io oa ou y")
_CODAS = ("", "", "", *listed("n r l s t m nd rk st ck ng x p d"))


def made_up_word(rng: random.Random, syllables: int) -> str:
    """A word that nobody knows, built of English-looking syllables."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
