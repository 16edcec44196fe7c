"""The source text of a pass, from the installed package and from nowhere else: a loaded graph's history can name any file."""

from __future__ import annotations

import re
from pathlib import Path

import llmlab

_OURS = re.compile(r"llmlab((?:/[A-Za-z_]\w*)+\.py):(\d{1,6})")
_MOST = 120
"""Lines that are shown."""


def source_lines(place: str) -> tuple[int, list[str]]:
    """(number of the first line, lines) of the class that `place`, such as `llmlab/graph/passes/fuse_rope.py:21`, names.

    No lines where that is none of llmlab's own files, or where no class begins there: then the graph was made by another version.
    """
    match = _OURS.fullmatch(place)
    if match is None or llmlab.__file__ is None:
        return 0, []
    root = Path(llmlab.__file__).resolve().parent
    path = Path(f"{root}{match[1]}").resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return 0, []
    lines, first = path.read_text("utf-8").splitlines(), int(match[2])
    if not 1 <= first <= len(lines):
        return 0, []
    while first < len(lines) and lines[first - 1].startswith("@"):  # a decorator
        first += 1
    if not lines[first - 1].startswith("class "):
        return 0, []
    end = next((i for i in range(first, len(lines)) if lines[i][:1].strip()), len(lines))
    found = lines[first - 1 : min(end, first - 1 + _MOST)]
    while found and not found[-1].strip():
        found.pop()
    return first, found
