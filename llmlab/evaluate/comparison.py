"""Several engines side by side: tables for a terminal and a notebook, data, and the picture of what each is good for."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmlab.evaluate.accuracy import Evaluation
from llmlab.evaluate.metrics import Estimate
from llmlab.evaluate.pareto import Point, beaten, figure, svg
from llmlab.graph.reports.render import as_text, html_table, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_SIGN = "×"
"""Before the name of a row that another beats on all three axes."""


@dataclass(frozen=True)
class Row:
    """One engine. Where it couldn't be built or measured, `problem` says why, and there is no evaluation."""

    name: str
    found: Evaluation | None
    problem: str = ""


@dataclass(frozen=True)
class _Column:
    """head over both forms; long: its words where there is room. cell: (value, interval or nothing) of a row."""

    head: str
    long: str
    cell: Callable[[Evaluation], tuple[str, str]]
    narrow: bool = True
    """Whether a terminal has room for it."""


@dataclass(frozen=True)
class Comparison:
    """What `llmlab.compare` found. `rows` are in the order that was asked for; the reference is one of them, as a rule."""

    reference: str
    rows: tuple[Row, ...]

    @cached_property
    def points(self) -> list[Point]:
        """Rows on the axes accuracy, speed and size: those that were measured, and whose speed on this machine counts."""
        points = []
        for row in self.rows:
            e = row.found
            if e is not None and e.cost is not None and not e.cost.unfit and e.accuracy.kl is not None:
                kl, cost = e.accuracy.kl, e.cost
                text = f"{row.name}: KL {kl.show('.3g')}, {cost.decode:,.1f} tokens/s, {cost.size_bytes / 1e6:,.1f} MB"
                points.append(Point(row.name, kl.value, cost.decode, cost.size_bytes, kl.low, kl.high, text=text))
        worse = beaten(points)
        return [Point(**{**vars(p), "beaten_by": worse.get(p.name, "")}) for p in points]

    @property
    def beaten(self) -> dict[str, str]:
        """By name of each row that another one beats on accuracy, speed and size: the name of that other one. (It is no
        worse on any of the three, and better on one at least.)"""
        return {p.name: p.beaten_by for p in self.points if p.beaten_by}

    def __getitem__(self, name: str) -> Evaluation:
        """The evaluation of a row, by name. Raises KeyError."""
        for row in self.rows:
            if row.name == name and row.found is not None:
                return row.found
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            facts: dict[str, Any] = {"name": row.name, "problem": row.problem or None}
            if row.found is not None:
                facts |= {k: v for k, v in row.found.to_dict().items() if k not in ("kind", "name")}
            rows.append(facts | {"beaten_by": self.beaten.get(row.name)})
        return {"kind": "comparison", "reference": self.reference, "rows": rows}

    def figure(self) -> Any:
        """A plotly figure: KL over speed, markers as large as the engines, hollow where another row is better on all three.

        Raises MissingDependencyError without plotly, which `llmlab[notebook]` brings.
        """
        return figure(self.points)

    @property
    def notes(self) -> list[str]:
        """What there is to say of single rows."""
        notes = [
            f"{_SIGN} {name}: {other} is no worse in accuracy, speed and size" for name, other in self.beaten.items()
        ]
        for row in self.rows:
            if row.problem:
                notes.append(f"{row.name}: {row.problem}")
            elif row.found is not None and row.found.cost is not None and row.found.cost.unfit:
                notes.append(f"{row.name}: its speed doesn't count: {row.found.cost.unfit}")
        return notes

    def _marked(self, row: Row) -> str:
        return f"{_SIGN} {row.name}" if row.name in self.beaten else row.name

    @property
    def _about(self) -> str:
        first = next((r.found.accuracy for r in self.rows if r.found is not None), None)
        data = "" if first is None else f" on {first.sequences} sequences, {first.tokens:,} tokens"
        return f"Against {self.reference}{data}; 95 % intervals"

    def _tables(self) -> list[tuple[str, list[_Column]]]:
        """(title, columns) of both tables; a column that no row has anything in is left out."""
        measured = [row.found for row in self.rows if row.found is not None]
        tables = [(self._about, _ACCURACY), ("What it costs", _COST)]
        return [(title, [c for c in columns if any(c.cell(e)[0] for e in measured)]) for title, columns in tables]

    def __str__(self) -> str:
        return as_text(self.__rich__(), 80)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = []
        for title, columns in self._tables():
            columns = [column for column in columns if column.narrow]
            if not columns:
                continue
            table = Table(title=plain(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
            table.add_column("engine", overflow="fold", min_width=8)
            for column in columns:
                table.add_column(column.head, justify="right", no_wrap=True)
            for row in self.rows:
                if row.found is not None:
                    cells = [column.cell(row.found) for column in columns]
                    dim = "dim" if row.name in self.beaten else ""
                    shown = [Text(value, dim).append(f"\n{more}" if more else "", "dim") for value, more in cells]
                    table.add_row(plain(self._marked(row), dim), *shown)
            parts.append(table)
        return Group(*parts, *(plain(note, "dim") for note in self.notes))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        tables = ""
        for title, columns in self._tables():
            rows = []
            for row in self.rows:
                if row.found is None or not columns:
                    continue
                style = " style='opacity:.55'" if row.name in self.beaten else ""
                cells = [(self._marked(row), ""), *(column.cell(row.found) for column in columns)]
                rows.append(
                    f"<span{style}>{html.escape(value)}<br><small>{html.escape(more)}</small></span>"
                    if more
                    else f"<span{style}>{html.escape(value)}</span>"
                    for value, more in cells
                )
            if rows:
                heads = ["engine", *(html.escape(column.long) for column in columns)]
                tables += f"<div><b>{html.escape(title)}</b></div>{html_table(heads, rows)}"
        notes = "".join(f"<div><small>{html.escape(note)}</small></div>" for note in self.notes)
        return {"text/plain": str(self), "text/html": f"<div>{tables}{notes}{svg(self.points)}</div>"}


def _estimate(
    pick: Callable[[Evaluation], Estimate | None], form: str, ends: str = ""
) -> Callable[[Evaluation], tuple[str, str]]:
    """The mean, and its interval in the same digits, or those of `ends`; of shares without the sign."""

    def bound(value: float) -> str:
        return f"{value:{ends or form}}".rstrip("%")

    def cell(found: Evaluation) -> tuple[str, str]:
        estimate = pick(found)
        if estimate is None:
            return "", ""
        if estimate.low is None or estimate.high is None:
            return f"{estimate.value:{form}}", ""
        return f"{estimate.value:{form}}", f"{bound(estimate.low)}–{bound(estimate.high)}"

    return cell


def _cost(show: Callable[[Any], str]) -> Callable[[Evaluation], tuple[str, str]]:
    return lambda found: ("", "") if found.cost is None else (show(found.cost), "")


def _speed(pick: Callable[[Any], float], form: str, batch: int) -> Callable[[Evaluation], tuple[str, str]]:
    """A number of the row of one batch size: the first (0) or the last (-1)."""

    def cell(found: Evaluation) -> tuple[str, str]:
        if found.cost is None or (batch and len(found.cost.speed) < 2):
            return "", ""
        row = found.cost.speed[batch]
        sign = "*" if found.cost.unfit else ""
        return f"{pick(row):{form}}{sign}", ""

    return cell


_ACCURACY = [
    _Column("KL", "KL, nats a token", _estimate(lambda e: e.accuracy.kl, ".2g")),
    _Column("top-1", "same most likely token", _estimate(lambda e: e.accuracy.top1, ".1%")),
    _Column("bits/byte", "bits a byte", _estimate(lambda e: e.accuracy.bits_per_byte, ".2g", ".1g")),
    _Column("answers\nexact", "exact match", _estimate(lambda e: e.accuracy.exact_match.get("all"), ".0%")),
    _Column("", "same greedy answer", _estimate(lambda e: e.accuracy.same_answer, ".0%"), narrow=False),
    _Column("tokens\nthe same", "tokens before a difference", _estimate(lambda e: e.accuracy.first_difference, ".1f")),
]
_COST = [
    _Column("MB", "size, MB", _cost(lambda c: f"{c.size_bytes / 1e6:,.1f}")),
    _Column("peak\nMB", "memory at most, MB", _cost(lambda c: f"{c.peak_bytes / 1e6:,.0f}")),
    _Column("load\nms", "load, ms", _cost(lambda c: f"{c.load_s * 1e3:,.0f}")),
    _Column("first\nms", "first token, ms", _speed(lambda r: r.first_token_ms, ",.1f", 0)),
    _Column("prefill\ntokens/s", "prefill, tokens/s", _speed(lambda r: r.prefill_tokens_per_s, ",.0f", 0)),
    _Column("decode\ntokens/s", "decode, tokens/s", _speed(lambda r: r.decode_tokens_per_s, ",.0f", 0)),
    _Column(
        "in a\nbatch", "decode in the largest batch, tokens/s", _speed(lambda r: r.decode_tokens_per_s, ",.0f", -1)
    ),
    _Column(
        "J/token",
        "energy, J a token",
        _cost(lambda c: "" if c.joules_per_token is None else f"{c.joules_per_token:.3g}"),
    ),
    _Column(
        "price/M",
        "price of a million tokens",
        _cost(lambda c: "" if c.price_per_million is None else f"{c.price_per_million:,.3g}"),
    ),
]


def names(given: Sequence[str]) -> list[str]:
    """Each with a number behind it where one before has the same."""
    found: list[str] = []
    for name in given:
        count, unique = 1, name
        while unique in found:
            count += 1
            unique = f"{name} ({count})"
        found.append(unique)
    return found
