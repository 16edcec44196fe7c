"""Held-out data as token ids: chats with known answers, prompts with answers, texts, files of them, or ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError
from llmlab.files import read_bytes
from llmlab.text.jsonl import lines, parsed
from llmlab.text.tokenizer import Tokenizer
from llmlab.zoo.tasks import Example, examples

Data: TypeAlias = "str | Path | Sequence[Any]"
"""`"tinychat"` (the zoo's held-out chats), a .jsonl or .txt file, or a list of: texts; (prompt, answer) pairs; conversations
(lists of messages); dicts with `text`, `prompt` and `answer`, or `messages`, and a `task` if wanted; lists of token ids."""

_DATA_LIMIT = 256 << 20  # bytes of a .txt file
_EXPECTED = (
    "expected a text, a (prompt, answer) pair, a list of messages or of token ids, or a dict with `text`, `prompt` and `answer`, "
    "or `messages`"
)


@dataclass(frozen=True)
class Sample:
    """One sequence. Tokens from `first` on are what a model is asked for; those before are its prompt."""

    ids: NDArray[np.int64]
    first: int
    """At least 1: nothing comes before the first token."""
    bytes: int | None
    """UTF-8 bytes of the text of the tokens from `first` on; None without a tokenizer."""
    task: str = ""
    answer: str | None = None
    """The reply that is right, where one is known: then ids[:first] is the prompt that asks for it."""

    @property
    def scored(self) -> int:
        """Number of tokens from `first` on."""
        return len(self.ids) - self.first


def samples(
    data: Data, tokenizer: Tokenizer | None, *, count: int, length: int, eos: int | None = None, seed: int = 0
) -> list[Sample]:
    """At most `count` sequences of at most `length` tokens each.

    A text longer than that becomes several; a chat or a pair that is longer is left out. `eos` ends each answer: that a
    model stops is part of it. seed: which of the zoo's chats. Raises InputError for data that holds nothing usable.
    """
    for name, given, least in (("samples", count, 1), ("length", length, 2)):
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            raise InputError(f"{name} is {given!r}, expected an integer of at least {least}")
    found: list[Sample] = []
    longer = 0
    for place, item in enumerate(_items(data, count, seed)):
        for sample in _read(item, place, tokenizer, length, eos):
            if len(sample.ids) > length:
                longer += 1
            elif len(found) < count:
                found.append(sample)
        if len(found) >= count:
            break
    if not found:
        reason = (
            f"all {longer} are longer than {length} tokens" if longer else "expected at least one text of two tokens"
        )
        raise InputError(f"the evaluation data holds nothing to measure: {reason}")
    return found


def _items(data: Data, count: int, seed: int) -> Iterator[Any]:
    if isinstance(data, (str, Path)):
        if str(data) == "tinychat":
            yield from examples("held-out", count, seed=seed)
            return
        path = Path(data).expanduser()
        if path.suffix not in (".jsonl", ".txt") or not path.is_file():
            raise InputError(
                f"data is {str(data)!r}, expected 'tinychat', a .jsonl or .txt file, or a list: one text is [text]"
            )
        if path.suffix == ".txt":
            yield read_bytes(path, InputError, _DATA_LIMIT).decode("utf-8", errors="replace")
            return
        yield from (parsed(path, number, line) for number, line in lines(path))
        return
    if isinstance(data, Mapping) or not isinstance(data, Sequence):
        raise InputError(f"data is a {type(data).__name__}, expected 'tinychat', a .jsonl or .txt file, or a list")
    yield from data


def _read(item: Any, place: int, tokenizer: Tokenizer | None, length: int, eos: int | None) -> Iterator[Sample]:
    task = ""
    if isinstance(item, Example):
        item, task = [*item.messages, {"role": "assistant", "content": item.answer}], item.task
    elif isinstance(item, Mapping):
        task = str(item.get("task", ""))
        if "prompt" in item and "answer" in item:
            item = (item["prompt"], item["answer"])
        else:
            item = item.get("text", item.get("messages"))
    if isinstance(item, np.ndarray) or (isinstance(item, Sequence) and item and _is_id(item[0])):
        yield from _windows(_ids(item, place), length, tokenizer, task)
        return
    if tokenizer is None:
        raise InputError("this engine has no tokenizer: give lists of token ids as data")
    if isinstance(item, str):
        yield from _windows(np.array(tokenizer.encode(item), np.int64), length, tokenizer, task)
    elif isinstance(item, Sequence) and item and all(isinstance(m, Mapping) for m in item):
        yield _chat(item, place, tokenizer, eos, task)
    elif isinstance(item, Sequence) and len(item) == 2 and all(isinstance(part, str) for part in item):
        prompt, answer = item
        if tokenizer.has_chat_template:
            ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])[1]
        else:
            ids = tokenizer.encode(prompt)
        yield _answered(ids, answer, place, tokenizer, eos, task)
    else:
        raise InputError(f"evaluation data, item {place}: a {type(item).__name__}, {_EXPECTED}")


def _chat(messages: Sequence[Any], place: int, tokenizer: Tokenizer, eos: int | None, task: str) -> Sample:
    last = messages[-1]
    if last.get("role") == "assistant" and isinstance(last.get("content"), str) and len(messages) > 1:
        return _answered(tokenizer.encode_chat(messages[:-1])[1], last["content"], place, tokenizer, eos, task)
    ids = np.array(tokenizer.encode_chat(messages)[1], np.int64)
    return Sample(ids, 1, _text_bytes(ids[1:], tokenizer), task)


def _answered(prompt: list[int], answer: str, place: int, tokenizer: Tokenizer, eos: int | None, task: str) -> Sample:
    end = tokenizer.encode(answer, add_special_tokens=False) + ([] if eos is None else [eos])
    if not prompt or not answer or not end:
        raise InputError(f"evaluation data, item {place}: an empty {'answer' if prompt else 'prompt'}")
    return Sample(np.array(prompt + end, np.int64), len(prompt), len(answer.encode()), task, answer)


def _windows(ids: NDArray[np.int64], length: int, tokenizer: Tokenizer | None, task: str) -> Iterator[Sample]:
    for start in range(0, len(ids), length):
        part = ids[start : start + length]
        if len(part) > 1:
            yield Sample(part, 1, _text_bytes(part[1:], tokenizer), task)


def _text_bytes(ids: NDArray[np.int64], tokenizer: Tokenizer | None) -> int | None:
    if tokenizer is None:
        return None
    if tokenizer.byte_level:
        return sum(len(tokenizer.token_bytes(i)) for i in ids.tolist())
    return len(tokenizer.decode(ids.tolist()).encode())


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _ids(item: Any, place: int) -> NDArray[np.int64]:
    if not all(_is_id(i) and 0 <= i < 1 << 31 for i in item):
        raise InputError(f"evaluation data, item {place}: token ids are integers of at least 0")
    return np.array(item, np.int64)
