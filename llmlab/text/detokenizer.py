"""Token ids to text, a few ids at a time, and stop strings in that text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llmlab.text.tokenizer import Tokenizer

_LONGEST_WAIT = 8
"""Ids held back for the rest of a character. UTF-8 has at most 4 bytes; more waiting would not complete anything."""


class Detokenizer:
    """The text of a growing list of ids. What it has returned is never taken back and never ends in half a character.

    With a byte-level tokenizer the pieces join exactly to `Tokenizer.decode` of all ids, whatever the ids are. Other
    tokenizers join exactly where the bytes are valid UTF-8. Amortised cost is O(1) an id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Decoders such as WordPiece and Metaspace look at neighbours, so the last piece is decoded again with new ids.
        self._done: list[int] = []
        self._done_text = ""
        self._waiting: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete, perhaps empty."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What was held back, now that nothing follows: a broken character shows as U+FFFD."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._take(self._decode_with_context())

    def _push_one(self, token_id: int) -> str:
        self._waiting.append(token_id)
        text = self._decode_with_context()
        if text.endswith("�") and len(self._waiting) < _LONGEST_WAIT:
            return ""
        return self._take(text)

    def _decode_with_context(self) -> str:
        return self._tokenizer.decode(self._done + self._waiting)

    def _take(self, text: str) -> str:
        new = text[len(self._done_text) :]
        piece = [token_id for token_id in self._waiting if not self._tokenizer.is_special(token_id)]
        piece_text = self._tokenizer.decode(piece)
        if piece_text:  # pieces are whole characters: a cut anywhere else would tear bytes apart
            self._done, self._done_text = piece, piece_text
        elif not self._done_text:  # leading spaces that decoders strip count once, so they stay in sight
            self._done, self._done_text = self._done + piece, text
        self._waiting = []
        return new


class StopStrings:
    """Finds the first stop string in text that arrives in pieces, however it is cut into pieces.

    First means: the one whose last character comes first; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found). The stop string itself is cut out.

        Text that could be the beginning of a stop string is held back until the next call decides.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
