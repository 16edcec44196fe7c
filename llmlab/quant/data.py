"""Calibration data: texts, chats, a jsonl file, token ids, or the zoo's split, as a list of id arrays; the same for the same seed."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmlab.errors import InputError
from llmlab.text.jsonl import lines, parsed

if TYPE_CHECKING:
    from llmlab.graph.graph import Graph
    from llmlab.text.tokenizer import Tokenizer

SAMPLES, LENGTH = 128, 512
LEAST_TOKENS = 256
"""A calibration set with fewer says nothing about a model."""
_TEXT_LIMIT = 16 << 20  # characters of one text
_SPLIT = "tinychat"

Ids: TypeAlias = NDArray[np.int64]
Source: TypeAlias = str | Path | Sequence[Any]


def calibration_data(
    source: Source,
    tokenizer: Tokenizer | None = None,
    *,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> list[Ids]:
    """At most `samples` sequences of at most `length` token ids.

    source: a list of texts, of chats (lists of messages, which go through the chat template), or of sequences of token ids;
        the path of a .jsonl file whose lines hold `{"text": …}`, `{"messages": […]}`, `{"prompt": …, "answer": …}`, a string or token
        ids; or "tinychat", the calibration split of the zoo's tasks, which no training and no test sees.
    tokenizer: what makes ids of texts and chats; not needed for ids.
    Longer sequences are cut into windows (what is left of the last one counts if it is half as long), and where there are too many, some
    are chosen by `seed`.
    Raises InputError, with the place, for what can't be used, and for fewer than 256 tokens altogether.
    """
    for name, given in (("samples", samples), ("length", length)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InputError(f"{name} is {given!r}, expected a whole number of at least 1")
    rng = random.Random(seed)
    entries = _entries(source, samples, rng, seed)
    if not entries:
        raise InputError("the calibration set is empty: give texts, chats, token ids or a .jsonl file")
    order = rng.sample(range(len(entries)), len(entries)) if len(entries) > samples else range(len(entries))
    share = -(-samples // len(entries))  # windows that one long text may give
    found: list[tuple[int, Ids]] = []
    for place in order:
        if len(found) >= samples:
            break
        ids = _ids(entries[place], place, tokenizer)
        windows = [ids[i : i + length] for i in range(0, len(ids), length)]
        if len(windows) > 1 and 2 * len(windows[-1]) < length:
            windows.pop()
        windows = windows if len(windows) <= share else rng.sample(windows, share)
        found += [(place, window) for window in windows][: samples - len(found)]
    data = [ids for _, ids in sorted(found, key=lambda entry: entry[0])]
    if (tokens := sum(len(ids) for ids in data)) < LEAST_TOKENS:
        raise InputError(
            f"the calibration set has {tokens} tokens in {len(data)} sample{'' if len(data) == 1 else 's'}, expected at least {LEAST_TOKENS}: give more or longer texts"
        )
    return data


def default_source(graph: Graph) -> str:
    """The data that fits a model whose user gave none: the zoo's split, for the zoo's model. InputError for others."""
    from llmlab import zoo

    if graph.assets.get("tokenizer.json") == (zoo.path() / "tokenizer.json").read_bytes():
        return _SPLIT
    raise InputError("needs a calibration: pass calibration=, such as a list of texts or chats, or a .jsonl file")


def tokenizer_of(graph: Graph) -> Tokenizer:
    """The tokenizer that a graph carries. InputError where it carries none."""
    from llmlab.text.tokenizer import Tokenizer

    if "tokenizer.json" not in graph.assets:
        raise InputError("the graph carries no tokenizer: give calibration data as lists of token ids")
    with tempfile.TemporaryDirectory(prefix="llmlab-tokenizer-") as folder:
        for name, data in graph.assets.items():
            (Path(folder) / name).write_bytes(data)
        return Tokenizer(folder)


def data_key(data: Sequence[Ids]) -> str:
    """A hash of the sequences."""
    digest = hashlib.sha256()
    for ids in data:
        digest.update(np.int64(len(ids)).tobytes() + np.ascontiguousarray(ids, np.int64).tobytes())
    return digest.hexdigest()


def _entries(source: Source, samples: int, rng: random.Random, seed: int) -> list[Any]:
    if isinstance(source, str) and source == _SPLIT:
        from llmlab.zoo.tasks import examples

        chats = examples("calibration", samples, seed=seed)
        return [[*chat.messages, {"role": "assistant", "content": chat.answer}] for chat in chats]
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.suffix != ".jsonl":
            raise InputError(
                f"calibration data is {str(source)!r}, expected a list of texts, the path of a .jsonl file, or {_SPLIT!r}"
            )
        return _lines(path, 4 * samples, rng)
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, (Sequence, np.ndarray)):
        raise InputError(f"calibration data is a {type(source).__name__}, expected a list of texts, chats or token ids")
    return list(source)


def _lines(path: Path, most: int, rng: random.Random) -> list[Any]:
    """Up to `most` entries of a jsonl file, each line as likely as any other, in the file's order."""
    kept: list[tuple[int, bytes]] = []
    for count, line in enumerate(lines(path), 1):
        if len(kept) < most:
            kept.append(line)
        elif (place := rng.randrange(count)) < most:
            kept[place] = line
    return [_entry(parsed(path, number, line), f"{path}, line {number}") for number, line in sorted(kept)]


def _entry(value: Any, where: str) -> Any:
    """A text, a list of messages or a list of token ids, out of what a line of a file, or a caller, may say instead."""
    if isinstance(value, Mapping):
        if isinstance(value.get("prompt"), str) and isinstance(value.get("answer"), str):
            pair = zip(("user", "assistant"), (value["prompt"], value["answer"]), strict=True)
            return [{"role": role, "content": content} for role, content in pair]
        value = value.get("text", value.get("messages"))
    chat = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(m, Mapping) for m in value)
    if isinstance(value, str) or chat or _are_ids(value):
        return value
    raise InputError(f'{where}: expected {{"text": "…"}}, {{"messages": […]}}, or a list of token ids')


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value)


def _ids(entry: Any, place: int, tokenizer: Tokenizer | None) -> Ids:
    where = f"calibration sample {place}"
    if isinstance(entry, Mapping):
        entry = _entry(entry, where)
    text = isinstance(entry, str)
    chat = isinstance(entry, (list, tuple)) and len(entry) > 0 and isinstance(entry[0], Mapping)
    if not text and not chat:
        return _checked(entry, where)
    if tokenizer is None:
        raise InputError(f"{where} is {'text' if text else 'a chat'}, and there is no tokenizer: give token ids")
    try:
        if text:
            if len(entry) > _TEXT_LIMIT:
                raise InputError(f"has {len(entry):,} characters, more than {_TEXT_LIMIT:,}: split it")
            ids = tokenizer.encode(entry)
        else:
            answered = entry[-1].get("role") == "assistant"
            _, ids = tokenizer.encode_chat(entry, {"add_generation_prompt": not answered})
    except InputError as problem:
        raise InputError(f"{where}: {problem}") from problem
    return np.asarray(ids, np.int64)


def _checked(entry: Any, where: str) -> Ids:
    try:
        ids = np.asarray(entry)
    except ValueError:
        ids = np.zeros((), object)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{where} is a {type(entry).__name__}, expected a text, a list of messages or a list of token ids"
        )
    if (ids < 0).any():
        raise InputError(f"{where} has the token id {int(ids.min())}, expected none below 0")
    return ids.astype(np.int64)
