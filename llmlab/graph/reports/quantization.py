"""What quantizing did to a graph: which projection got what, and which stayed wide and why."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table

from llmlab.graph.reports.diff import number, text
from llmlab.graph.reports.fold import Folded, fold
from llmlab.graph.reports.render import html_table, plain
from llmlab.graph.reports.report import PassReport

_HEAD = ("projection", "weights", "activations", "bytes")


@dataclass(frozen=True)
class QuantizedProjection:
    """One projection: how its weights and activations are rounded (empty: wide), its bytes, and why it stayed wide, if it did."""

    name: str
    role: str
    weights: str
    activations: str
    bytes_before: int
    bytes_after: int
    reason: str = ""


@dataclass(frozen=True)
class QuantizationReport(PassReport):
    """The report of `llmlab.quantize`: that of a pass, with the recipe and what each projection got."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    projections: tuple[QuantizedProjection, ...] = ()

    @property
    def wide(self) -> tuple[QuantizedProjection, ...]:
        """Those that stayed as they were."""
        return tuple(p for p in self.projections if not p.weights and not p.activations)

    def to_dict(self) -> dict[str, Any]:
        rows = [vars(projection) for projection in self.projections]
        return {**super().to_dict(), "quantization": {"recipe": dict(self.recipe), "projections": rows}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationReport:
        """What `to_dict` gave. Raises TypeError, KeyError, ValueError or AttributeError where it is something else."""
        given, own = vars(PassReport.from_dict(data)), data["quantization"]
        rows = tuple(
            QuantizedProjection(
                text(row["name"]),
                text(row["role"]),
                text(row["weights"]),
                text(row["activations"]),
                number(row["bytes_before"]),
                number(row["bytes_after"]),
                text(row["reason"]),
            )
            for row in own["projections"]
        )
        return cls(**given, recipe=dict(own["recipe"]), projections=rows)

    def rows(self) -> list[Folded]:
        """(projection, weights, activations, bytes), layers that are alike as one; why they are wide in place of what they got."""
        return fold(
            (
                p.name,
                p.weights or f"wide ({p.reason or 'weights'})",
                p.activations,
                f"{p.bytes_before:,} → {p.bytes_after:,}" if p.bytes_after != p.bytes_before else f"{p.bytes_before:,}",
            )
            for p in self.projections
        )

    def __str__(self) -> str:
        before, after = self.weight_bytes_before, self.weight_bytes_after
        done = len(self.projections) - len(self.wide)
        line = f"{self.title} ({self.summary}): {done} of {len(self.projections)} projections, {before / 1e6:.1f} → {after / 1e6:.1f} MB"
        return "\n  ".join(
            [line, *(f"{row.texts[0]}{row.times}: {row.texts[1]}" for row in self.rows() if _is_wide(row))]
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = Table(*_HEAD, title=plain(str(self).partition("\n")[0]))
        table.columns[-1].justify = "right"
        for row in self.rows():
            name, *rest = row.texts
            style = "yellow" if _is_wide(row) else ""
            table.add_row(plain(name + row.times), *(plain(cell, style) for cell in rest))
        yield table

    def details(self) -> str:
        """The table of projections, as HTML."""
        return html_table(
            _HEAD, ([html.escape(row.texts[0] + row.times), *map(html.escape, row.texts[1:])] for row in self.rows())
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        page = f"<div><b>{html.escape(str(self).partition(chr(10))[0])}</b>{self.details()}</div>"
        return {"text/plain": str(self), "text/html": page}


def _is_wide(row: Folded) -> bool:
    return row.texts[1].startswith("wide")


def read_report(data: Mapping[str, Any]) -> PassReport:
    """The report that `to_dict` made, of a pass or of quantizing."""
    return (QuantizationReport if "quantization" in data else PassReport).from_dict(data)
