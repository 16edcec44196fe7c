"""Files of texts, chats or token ids, one JSON value a line, read as a stream with limits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmlab.errors import InputError
from llmlab.files import open_regular

LINE_LIMIT = 1 << 20  # bytes of a line
FILE_LIMIT = 4 << 30  # bytes of a file


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line that isn't blank. Raises InputError where the file can't be read, is no regular file, or it or a line
    is too large."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > FILE_LIMIT:
                raise InputError(f"{path}: {size:,} bytes, more than the {FILE_LIMIT:,} that such a file may have")
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise InputError(f"{path}, line {number}: more than {LINE_LIMIT:,} bytes: split the text")
                if line.strip():
                    yield number, line
    except (OSError, ValueError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{path}: can't be read ({getattr(problem, 'strerror', None) or problem})") from problem


def parsed(path: Path, number: int, line: bytes) -> Any:
    """The value of a line. Raises InputError, with the place."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise InputError(f"{path}, line {number}: not valid JSON ({reason})") from problem
