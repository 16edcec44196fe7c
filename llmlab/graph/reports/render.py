"""What all reports are drawn with: plain text, signed lines, details and tables; rich in a terminal, HTML in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.text import Text

_LEFT = "style='text-align:left;vertical-align:top'"
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
# By the sign that a line begins with: what it says, its style in a terminal, its background on light and dark pages.
SIGNS = {
    "+": ("added", "green", "#2ea04340"),
    "-": ("removed", "red", "#f8514940"),
    "~": ("changed", "yellow", "#d2992240"),
}


def plain(text: str, style: str = "") -> Text:
    """Names come from files of strangers: no markup in them counts, and no control character reaches the terminal."""
    return Text(text.translate(_CONTROL), style, overflow="fold")


def as_text(shown: RenderableType, width: int) -> str:
    """What a terminal would show, without colours: also in a notebook, where rich would take styles for wanted."""
    console = Console(width=width, color_system=None, force_jupyter=False, force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip("\n")


def tally(lines: Sequence[str]) -> str:
    """`, 2 added, 1 removed`: how many lines start with each sign."""
    counts = ((sign, sum(line.startswith(sign) for line in lines)) for sign in SIGNS)
    return "".join(f", {count} {SIGNS[sign][0]}" for sign, count in counts if count)


def lines_text(lines: Iterable[str], indent: str) -> list[Text]:
    return [plain(indent + line, SIGNS[line[0]][1] if line[:1] in SIGNS else "dim") for line in lines]


def lines_html(lines: Iterable[str]) -> list[str]:
    shown = []
    for line in lines:
        if line[:1] in SIGNS:
            word, _, color = SIGNS[line[0]]
            shown.append(
                f"<span style='background:{color}'><small>{word}</small> <code>{html.escape(line[2:])}</code></span>"
            )
        else:
            shown.append(f"&emsp;<small>{html.escape(line)}</small>")
    return shown


def details(summary: str, lines: Sequence[str]) -> str:
    """Lines of HTML that a click on the summary, plain text, unfolds; nothing where there are none."""
    if not lines:
        return ""
    body = "".join(f"<div>{line}</div>" for line in lines)
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th {_LEFT}>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td {_LEFT}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
