"""What one training step reads: seeded by its number, so that any number of workers makes the same run."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmlab.zoo.tasks import Message, sample
from llmlab.zoo.tokenizer import encode_chats

WEIGHTS = {
    "counting": 1.0,
    "arithmetic": 2.5,
    "capitals": 1.0,
    "opposites": 0.8,
    "spelling": 1.2,
    "reversing": 1.6,
    "sorting": 1.6,
    "recall": 3.0,
    "chat": 1.5,
    "smalltalk": 0.6,
    "unknown": 1.0,
}
"""Share of each task in training: more for those that are learned by practice than by heart."""

IGNORE = -100
_BARE_SHARE = 0.1
_SHAPES = ((0.45, 64), (0.05, 160))
"""(rows as a share of the step's chats, tokens) of the arrays that hold one short chat a row."""
_PACKED_SHARE = 0.07


@dataclass(frozen=True)
class ChatArray:
    """Chats as rows of one size; causal attention makes right padding harmless. The same shapes every step."""

    ids: NDArray[np.int64]
    """[rows, length]"""
    learned: NDArray[np.int64]
    """[rows * length // 3]; flat positions whose next token is to be learned, filled up with 0"""
    targets: NDArray[np.int64]
    """[rows * length // 3]; those next tokens, filled up with IGNORE"""


Encoded = tuple[list[int], list[bool]]


def _chat(rng: random.Random) -> tuple[list[Message], bool]:
    """One training chat, and whether it goes without the chat template."""
    example = sample(rng, "train", rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0])
    messages = [*example.messages, {"role": "assistant", "content": example.answer}]
    return messages, len(messages) == 2 and rng.random() < _BARE_SHARE


def training_batch(tokenizer: Tokenizer, step: int, size: int, max_length: int, seed: int = 0) -> list[ChatArray]:
    """The `size` chats of one step, in a few arrays whose shapes depend on `size` and `max_length` alone.

    Short chats get a row each. Long ones, and the short ones that are left over, follow each other in rows of
    `max_length` tokens as the turns of one long chat: so the model sees questions far from the start as well.
    The few chats that fit nowhere are dropped.
    """
    rng = random.Random(seed * 1_000_003 + step)
    chats = [_chat(rng) for _ in range(size)]
    encoded = encode_chats(tokenizer, [chat for chat, _ in chats], [bare for _, bare in chats])
    arrays = []
    rest = encoded
    shorter = 0
    for share, width in _SHAPES:
        if width >= max_length:
            continue
        rows = max(1, int(size * share))
        here: list[Encoded] = []
        others: list[Encoded] = []
        for item in rest:
            fits = shorter < len(item[0]) <= width and len(here) < rows
            (here if fits else others).append(item)
        arrays.append(_array([[item] for item in here], rows, width))
        rest, shorter = others, width
    rows = max(2, int(size * _PACKED_SHARE))
    arrays.append(_array(_pack(rest, rows, max_length), rows, max_length))
    return arrays


def _pack(items: list[Encoded], rows: int, length: int) -> list[list[Encoded]]:
    """Each item into the first row that has room, the longest items first."""
    packed: list[list[Encoded]] = [[] for _ in range(rows)]
    room = [length] * rows
    for item in sorted(items, key=lambda item: -len(item[0])):
        row = next((row for row in range(rows) if room[row] >= len(item[0])), None)
        if row is not None:
            packed[row].append(item)
            room[row] -= len(item[0])
    return packed


def _array(packed: list[list[Encoded]], rows: int, length: int) -> ChatArray:
    ids = np.zeros((rows, length), np.int64)
    wanted = np.zeros((rows, length), bool)
    for row, items in enumerate(packed):
        start = 0
        for tokens, learned in items:
            ids[row, start : start + len(tokens)] = tokens
            wanted[row, start : start + len(tokens)] = learned
            start += len(tokens)
    wanted[:, 0] = False  # nothing comes before it
    positions = np.flatnonzero(wanted)[: rows * length // 3]
    learned_at = np.zeros(rows * length // 3, np.int64)
    targets = np.full(rows * length // 3, IGNORE, np.int64)
    learned_at[: len(positions)] = positions - 1
    targets[: len(positions)] = ids.reshape(-1)[positions]
    return ChatArray(ids, learned_at, targets)
