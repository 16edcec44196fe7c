"""How histories, diffs and answers to `why` look: rich in a terminal, HTML in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmlab.graph.reports.diff import NO_DIFFERENCE, GraphDiff
from llmlab.graph.reports.fold import Folded, fold

if TYPE_CHECKING:
    from llmlab.graph.reports.report import History, PassReport
    from llmlab.graph.reports.why import PassHere, Why

_LEFT = "style='text-align:left;vertical-align:top'"
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
_WIDE = 90  # columns of a terminal from which on all of a history's numbers find room beside the names
# By the sign that a line begins with: what it says, its style in a terminal, its background on light and dark pages.
_SIGNS = {
    "+": ("added", "green", "#2ea04340"),
    "-": ("removed", "red", "#f8514940"),
    "~": ("changed", "yellow", "#d2992240"),
}
_STATUS = {"fired": "bold green", "changed": "green", "near miss": "yellow"}
_SAYS = {"changed": "fired elsewhere, changed this"}


def plain(text: str, style: str = "") -> Text:
    """Names come from files of strangers: no markup in them counts, and no control character reaches the terminal."""
    return Text(text.translate(_CONTROL), style, overflow="fold")


def history_text(history: History, width: int) -> RenderableType:
    if not history:
        return Text("no pass has run")
    columns = ("pass", "rewritten", "nodes", "weights", "time")[: 5 if width >= _WIDE else 3]
    table = Table(*columns, title="Passes")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].overflow = "fold"
    for report in history:
        what = plain(report.title, "bold" if report.rewrites else "")
        if report.summary and report.run == 1:
            what.append("\n").append_text(plain(report.summary, "dim"))
        for miss in report.folded_misses():
            what.append("\n").append_text(plain(_not(miss), "yellow"))
        table.add_row(what, *_numbers(report)[: len(columns) - 1])
    return table


def _numbers(report: PassReport) -> tuple[str, str, str, str]:
    return (
        f"{report.rewrites} of {report.matches}",
        f"{report.nodes_before} → {report.nodes_after}",
        _megabytes(report),
        f"{report.seconds:.2f} s",
    )


def history_html(history: History) -> str:
    head = ("pass", "rewritten", "nodes", "operators that came and went", "weights", "time")
    return html_table(head, map(_report_cells, history))


def _report_cells(report: PassReport) -> list[str]:
    misses = [f"<small>{html.escape(_not(miss))}</small>" for miss in report.folded_misses()]
    places = [
        f"<small>{html.escape(place.texts[0] + place.times)}"
        + "".join(
            f"<br>&emsp;<span style='background:{_SIGNS[sign][2]}'>{_SIGNS[sign][0]}</span> {html.escape(names)}"
            for sign, names in (("-", place.texts[1]), ("+", place.texts[2]))
            if names
        )
        + "</small>"
        for place in report.folded_places()
    ]
    operators = ", ".join(f"{op} {change:+d}" for op, change in report.diff.ops.items())
    what = (
        f"<b>{html.escape(report.title)}</b><br><small>{html.escape(report.summary)}</small>"
        + _details(_count(len(report.near_misses), "near miss", "near misses"), misses)
        + _details(f"{_count(report.rewrites, 'rewrite', 'rewrites')} ({report.source or 'no source file'})", places)
    )
    rewritten, nodes, weights, seconds = _numbers(report)
    return [what, rewritten, nodes, f"<small>{html.escape(operators)}</small>", weights, seconds]


def diff_text(diff: GraphDiff) -> RenderableType:
    if not diff:
        return Text(NO_DIFFERENCE)
    parts: list[Text] = [Text(f"{diff}  (+ added, - removed, ~ changed)", "bold")]
    for block in diff.blocks():
        parts.append(plain(block.texts[0] + block.times, "bold"))
        parts += _lines_text(block.texts[1:], "  ")
    if tensors := diff.tensor_lines():
        parts.append(Text("inputs, outputs and weights", "bold"))
        parts += _lines_text([line.texts[0] + line.times for line in tensors], "  ")
    return Group(*parts)


def diff_html(diff: GraphDiff) -> str:
    if not diff:
        return f"<div>{NO_DIFFERENCE}</div>"
    operators = ", ".join(f"{op} {change:+d}" for op, change in diff.ops.items())
    return (
        f"<div><b>{html.escape(str(diff))}</b><br><small>{html.escape(operators)}</small></div>"
        + "".join(_details(b.texts[0] + b.times + _tally(b.texts[1:]), _lines_html(b.texts[1:])) for b in diff.blocks())
        + _details(
            "inputs, outputs and weights", _lines_html([line.texts[0] + line.times for line in diff.tensor_lines()])
        )
    )


def why_text(why: Why) -> RenderableType:
    parts: list[RenderableType] = [plain(why.place, "bold")]
    if not why.passes:
        parts.append(Text("no pass has run on this graph"))
    for here in why.with_status(*_STATUS):
        line = plain(here.report.title, "bold").append(f"  {_says(here)}", _STATUS[here.status])
        if here.report.source:
            line.append_text(plain(f"  {here.report.source}", "dim"))
        parts += [line, *_lines_text(_lines(here), "  ")]
        parts += [plain(f"  {_not(miss)}", "yellow") for miss in _misses(here)]
    if why.not_found:
        parts.append(plain(f"pattern not found here: {', '.join(why.not_found)}", "dim"))
    return Group(*parts)


def why_html(why: Why) -> str:
    rows = [
        [
            f"<b>{html.escape(here.report.title)}</b><br><small>{html.escape(here.report.source)}</small>",
            html.escape(_says(here)),
            _details("what changed" + _tally(lines), _lines_html(lines))
            + "".join(f"<div><small>{html.escape(_not(miss))}</small></div>" for miss in _misses(here)),
        ]
        for here in why.with_status(*_STATUS)
        for lines in [_lines(here)]
    ]
    end = f"<div><small>pattern not found here: {html.escape(', '.join(why.not_found))}</small></div>"
    return (
        f"<div><b>{html.escape(why.place)}</b>{'' if why.passes else ': no pass has run on this graph'}</div>"
        + (html_table(("pass", "what it did here", ""), rows) if rows else "")
        + (end if why.not_found else "")
    )


def _misses(here: PassHere) -> list[Folded]:
    return fold((miss.node, miss.reason) for miss in here.near_misses)


def _lines(here: PassHere) -> list[str]:
    return [line for block in here.diff.blocks() for line in block.texts[1:]]


def _says(here: PassHere) -> str:
    return f"fired {len(here.rewrites)}×" if here.rewrites else _SAYS.get(here.status, here.status)


def _not(miss: Folded) -> str:
    return f"not {miss.texts[0]}: {miss.texts[1]}{miss.times}"


def _count(number: int, one: str, many: str) -> str:
    return "" if not number else f"{number} {one if number == 1 else many}"


def _megabytes(report: PassReport) -> str:
    before, after = (f"{size / 1e6:.1f}" for size in (report.weight_bytes_before, report.weight_bytes_after))
    return f"{after} MB" if before == after else f"{before} → {after} MB"


def _tally(lines: Sequence[str]) -> str:
    counts = ((sign, sum(line.startswith(sign) for line in lines)) for sign in _SIGNS)
    return "".join(f", {count} {_SIGNS[sign][0]}" for sign, count in counts if count)


def _lines_text(lines: Iterable[str], indent: str) -> list[Text]:
    return [plain(indent + line, _SIGNS[line[0]][1] if line[:1] in _SIGNS else "dim") for line in lines]


def _lines_html(lines: Iterable[str]) -> list[str]:
    shown = []
    for line in lines:
        if line[:1] in _SIGNS:
            word, _, color = _SIGNS[line[0]]
            shown.append(
                f"<span style='background:{color}'><small>{word}</small> <code>{html.escape(line[2:])}</code></span>"
            )
        else:
            shown.append(f"&emsp;<small>{html.escape(line)}</small>")
    return shown


def _details(summary: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    body = "".join(f"<div>{line}</div>" for line in lines)
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th {_LEFT}>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td {_LEFT}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
