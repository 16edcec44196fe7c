"""The tokenizer of an engine folder or checkpoint: text to ids, ids to text, messages to a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from llmlab.errors import InputError
from llmlab.text.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Reads `tokenizer.json`, and beside it, where they exist, `tokenizer_config.json` and `chat_template.jinja`.

    path: the folder, or tokenizer.json itself. Raises InputError if it is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        folder = file.parent
        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder")
        except FileNotFoundError as error:
            raise InputError(f"{folder} has no {file.name}: give token ids, or a folder with a tokenizer") from error
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file} is not a readable tokenizer ({' '.join(str(error).split())[:200]})") from error
        # A length limit or padding stored in the file would change prompts silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.byte_level = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
        """Whether every id stands for bytes of its own, so that text can be put together id by id."""
        self._special_ids = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}
        config = _read_config(folder / "tokenizer_config.json")
        self._chat_source = _read_template(folder / "chat_template.jinja") or _template_of(config)
        self._special_tokens = _special_tokens(config)
        self._chat: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_source is not None

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises InputError if there is none, or if it isn't valid."""
        if self._chat is None:
            if self._chat_source is None:
                raise InputError("this tokenizer has no chat template: give the prompt as text instead of messages")
            self._chat = ChatTemplate(self._chat_source, self._special_tokens)
        return self._chat

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens (BOS, ...) are added as tokenizer.json's post-processor says."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # lone surrogates arrive here as TypeError or UnicodeEncodeError
            raise InputError(f"the text can't be tokenized ({' '.join(str(error).split())[:200]})") from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> tuple[str, list[int]]:
        """(prompt text, ids) of a conversation, ending where the assistant's answer begins.

        The template writes the special tokens itself, so none are added.
        """
        text = self.chat_template.render(messages, variables)
        return text, self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids that the tokenizer doesn't know (padding of the vocabulary) give nothing."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this id out."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a byte-level tokenizer's id stands for; none for special and unknown ids."""
        found = self._bytes.get(token_id)
        if found is None:
            token = None if token_id in self._special_ids else self._tokenizer.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if token is None else _unmap(token)
        return found


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _unmap(token: str) -> bytes:
    table = _byte_of_char()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()  # an added token, stored as it is


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


def _read_template(file: Path) -> str | None:
    if not file.is_file():
        return None
    if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes, at most {MAX_TEMPLATE_CHARS:,} are allowed")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read ({error})") from error


def _template_of(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
