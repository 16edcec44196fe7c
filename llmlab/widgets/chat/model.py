"""A conversation as plain data: turns, the answers to each, their tokens, and where two answers part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmlab.runtime.outputs import Delta, RequestMetrics
    from llmlab.runtime.sampler import TokenLogprobs
    from llmlab.text.tokenizer import Tokenizer


class Choice(NamedTuple):
    """A token that could have come, and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str
    """What it added to the text: never half a character, so it may be empty and the next one has it all."""
    label: str
    """The token by itself, for people: its text, or its bytes where those are no text."""
    probability: float | None = None
    top: tuple[Choice, ...] = ()
    """The most likely tokens in its place, best first."""


@dataclass
class Answer:
    """What one engine said to a turn, growing while it generates."""

    engine: str
    tokens: list[Token] = field(default_factory=list)
    going: bool = True
    finish_reason: str | None = None
    error: str = ""
    """One line, where the engine failed."""
    metrics: RequestMetrics | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def extend(self, delta: Delta, tokenizer: Tokenizer) -> None:
        """Take in a piece of a streamed answer; its text belongs to its last token."""
        given: Sequence[TokenLogprobs | None] = delta.logprobs or [None] * len(delta.token_ids)
        for place, (token_id, logprobs) in enumerate(zip(delta.token_ids, given, strict=True)):
            text = delta.text if place == len(delta.token_ids) - 1 else ""
            top = () if logprobs is None else logprobs.top
            self.tokens.append(
                Token(
                    token_id,
                    text,
                    label(token_id, tokenizer),
                    None if logprobs is None else math.exp(logprobs.logprob),
                    tuple(Choice(label(other, tokenizer), math.exp(value)) for other, value in top),
                )
            )
        if not delta.token_ids and delta.text and self.tokens:  # what was held back
            last = self.tokens[-1]
            self.tokens[-1] = Token(last.id, last.text + delta.text, last.label, last.probability, last.top)

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "text": self.text,
            "tokens": [asdict(token) | {"top": [list(choice) for choice in token.top]} for token in self.tokens],
            "finish_reason": self.finish_reason,
            "error": self.error or None,
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
        }


@dataclass
class Turn:
    """What was asked, and what each engine answered."""

    user: str
    answers: list[Answer] = field(default_factory=list)
    kept: int = 0
    """Which answer the conversation goes on with, for both engines."""

    @property
    def going(self) -> bool:
        return any(answer.going for answer in self.answers)

    @property
    def first_difference(self) -> int | None:
        """Index of the first token in which two answers differ, None as far as they are alike."""
        if len(self.answers) < 2:
            return None
        return first_difference(self.answers[0].token_ids, self.answers[1].token_ids)

    def comparison(self) -> str:
        """One line on how the two answers compare; empty with one."""
        if len(self.answers) < 2:
            return ""
        a, b = self.answers
        place, common = self.first_difference, min(len(a.tokens), len(b.tokens))
        if place is not None:
            return f"{b.engine} differs from token {place + 1} on: {_choice(a, b, place)}; {_choice(b, a, place)}"
        if self.going or len(a.tokens) != len(b.tokens):
            return f"alike in the {common} tokens that both have" if common else ""
        return f"alike in all {common} tokens" if common else ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "user": self.user,
            "answers": [answer.to_dict() for answer in self.answers],
            "kept": self.kept,
            "first_difference": self.first_difference,
            "comparison": self.comparison(),
        }


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first place that both have and where they differ."""
    return next((place for place, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)


def label(token_id: int, tokenizer: Tokenizer) -> str:
    """A token by itself as text in quotes, its name if it is special, its bytes where they are no whole characters."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if tokenizer.is_special(token_id):
        return text
    if "\ufffd" in text and tokenizer.byte_level:
        raw = tokenizer.token_bytes(token_id)
        return text if raw == text.encode() else "bytes " + raw.hex(" ").upper()
    return f"“{text}”".replace("\n", "⏎").replace("\t", "⇥")


def percent(probability: float) -> str:
    """A probability for people: more places near the ends, and never a 100 % that isn't."""
    shown = f"{100 * probability:.1f} %"
    if shown == "100.0 %" and probability < 1:
        return "> 99.9 %" if probability < 0.9999995 else "100 %"
    return "< 0.1 %" if shown == "0.0 %" else shown


def _choice(mine: Answer, other: Answer, place: int) -> str:
    """What `mine` chose at `place`, and how likely the other engine's choice was to it."""
    own, its = mine.tokens[place], other.tokens[place]
    if own.probability is None:
        return f"{mine.engine} has {own.label}"
    said = f"{mine.engine} has {own.label} at {percent(own.probability)}"
    given = {choice.label: choice.probability for choice in own.top}.get(its.label)
    return said if given is None else f"{said}, and {its.label} at {percent(given)}"
