"""Chats with a known answer, generated: the text tinychat is trained, calibrated and tested on. No outside data.

One module a task; each has `draw(rng)`. `examples` makes seeded lists of them, the same in every process.

The splits are disjoint by construction: a hash of the whole canonical conversation (case, spacing and closing
punctuation don't count, nor does a system message) says which split a prompt belongs to, and every earlier turn of a
chat has to belong to the same split. For the closed tasks (capitals, opposites, small talk, number words) that means:
a held-out prompt is a combination of phrasing and item that training never saw, while each single fact occurs in
training in other phrasings. Nobody can answer for a capital that was never told.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence

from llmlab.errors import InputError
from llmlab.zoo.tasks import (
    arithmetic,
    capitals,
    chat,
    counting,
    opposites,
    recall,
    reversing,
    smalltalk,
    sorting,
    spelling,
    unknown,
)
from llmlab.zoo.tasks.common import Draw, Example, Message

__all__ = ["SPLITS", "TASKS", "Example", "canonical", "examples", "sample", "split_of"]

SPLITS = ("train", "calibration", "held-out")
_SHARE = {"held-out": 10, "calibration": 5}  # percent; training has the rest

TASKS: dict[str, Draw] = {
    "counting": counting.draw,
    "arithmetic": arithmetic.draw,
    "capitals": capitals.draw,
    "opposites": opposites.draw,
    "spelling": spelling.draw,
    "reversing": reversing.draw,
    "sorting": sorting.draw,
    "recall": recall.draw,
    "chat": chat.draw,
    "smalltalk": smalltalk.draw,
    "unknown": unknown.draw,
}
"""Task name to generator, in the order of every table."""

_SYSTEM = (
    "You are tinychat, a small and friendly assistant.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a friendly chat bot.",
)
_SYSTEM_SHARE = 0.1
_MOST_DRAWS = 100_000


def canonical(turns: Sequence[str]) -> str:
    """The conversation as the split sees it: casefolded, blanks collapsed, closing punctuation dropped."""
    return "\x1f".join(re.sub(r"\s+", " ", turn).strip().rstrip(".?! ").casefold() for turn in turns)


def _split_of_text(text: str) -> str:
    percent = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 100
    for split, share in _SHARE.items():
        if percent < share:
            return split
        percent -= share
    return "train"


def split_of(turns: Sequence[str]) -> str | None:
    """The split that owns a conversation of user, assistant, user, … turns; None if its prefixes disagree."""
    owners = {_split_of_text(canonical(turns[:end])) for end in range(1, len(turns) + 1, 2)}
    return owners.pop() if len(owners) == 1 else None


def sample(rng: random.Random, split: str, task: str) -> Example:
    """The next example of `task` that `rng` leads to and `split` owns."""
    for _ in range(_MOST_DRAWS):
        turns, answer = TASKS[task](rng)
        if split_of(turns) == split:
            break
    else:
        raise InputError(f"task {task!r} gave no prompt of split {split!r} in {_MOST_DRAWS:,} draws")
    messages: list[Message] = []
    if rng.random() < _SYSTEM_SHARE:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
    for index, text in enumerate(turns):
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
    return Example(task, messages, answer)


def _stream(seed: int, split: str, task: str) -> random.Random:
    # seeded by bytes that mean the same in every process; the built-in hash() would not
    return random.Random(int.from_bytes(hashlib.blake2b(f"{seed}/{split}/{task}".encode(), digest_size=8).digest()))


def examples(split: str, count: int, seed: int = 0, task: str | None = None) -> list[Example]:
    """`count` examples of a split, of one task or of all tasks in turn.

    The same arguments give the same list in every process. Outside training no prompt comes twice.

    Raises:
        InputError: unknown split or task, a negative count, or more distinct prompts than the task has.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}, expected one of: {', '.join(SPLITS)}")
    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}, expected one of: {', '.join(TASKS)}")
    if count < 0:
        raise InputError(f"count is {count}, expected 0 or more")
    names = list(TASKS) if task is None else [task]
    streams = {name: _stream(seed, split, name) for name in names}
    found: list[Example] = []
    seen: set[str] = set()
    repeats = 0
    while len(found) < count:
        name = names[len(found) % len(names)]
        example = sample(streams[name], split, name)
        key = canonical([message["content"] for message in example.messages if message["role"] != "system"])
        if split != "train" and key in seen:
            repeats += 1
            if repeats > 20 * count + 1000:
                raise InputError(f"{split} has too few distinct {name} prompts for count={count}: ask for fewer")
            continue
        seen.add(key)
        found.append(example)
    return found
