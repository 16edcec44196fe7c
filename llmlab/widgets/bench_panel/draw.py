"""The bench panel's HTML and SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from llmlab.evaluate.latencies import Latencies
from llmlab.evaluate.layers.model import milliseconds
from llmlab.widgets.bench_panel.state import BenchState
from llmlab.widgets.markup import button, h

_BINS = 24
_WIDE, _HIGH, _ABOVE = 560, 96, 30  # pixels: the bars, and the marks' names above them


def facts(row: Latencies) -> list[str]:
    """One batch size in a few words."""
    first, gap = (row.percentile(what, 50) for what in ("first_token", "between_tokens"))
    return [
        f"B={row.batch}",
        f"first token {milliseconds(first)}",
        f"between tokens {milliseconds(gap)}",
        f"{row.tokens_per_s:,.0f} tokens/s",
    ]


def state(panel: BenchState) -> Markup:
    """What is going on, and the buttons."""
    running = panel.state == "running"
    act = button("Stop", "stop") if running else button("Measure again", "again")
    said = f"{panel.state}: {panel.doing}" if panel.doing else panel.state
    what = f"random tokens, {panel.prompt} in, {panel.output} out, {panel.repeat} runs each"
    return h(
        "div",
        h("h3", panel.title()),
        h("p", what, "; ", h("span", said, role="status")),
        h("div", act, class_="bar live-only"),
    )


def numbers(panel: BenchState) -> Markup:
    """A table of percentiles and two histograms for each batch size."""
    if not panel.rows:
        return h("p", "nothing is measured yet", class_="soft")
    groups = (("", 1), ("first token", 2), ("between tokens", 3), ("", 1))
    above = [h("th", group, scope="colgroup", colspan=span, class_="number") for group, span in groups]
    heads = ("sequences", "p50", "p90", "p50", "p90", "p99", "tokens/s")
    body = []
    for row in panel.rows:
        cells = [str(row.batch)]
        cells += [milliseconds(row.percentile("first_token", share)) for share in (50, 90)]
        cells += [milliseconds(row.percentile("between_tokens", share)) for share in (50, 90, 99)]
        body.append(h("tr", [h("td", cell, class_="number") for cell in (*cells, f"{row.tokens_per_s:,.0f}")]))
    named = [h("th", head, scope="col", class_="number") for head in heads]
    table = h("table", h("tr", above), h("tr", named), body)
    drawn = [
        h(
            "div",
            h("h4", f"B={row.batch}: between tokens"),
            histogram(row.between_tokens, f"between tokens at batch {row.batch}"),
        )
        for row in panel.rows
        if row.between_tokens
    ]
    return h("div", h("div", table, class_="wide"), h("div", drawn, class_="columns"))


def histogram(seconds: Sequence[float], label: str) -> Markup:
    """How often each latency was: bars from the shortest to the longest, with the middle and the 99th percentile marked."""
    values = np.asarray(seconds) * 1e3
    low, high = float(values.min()), float(values.max())
    if high <= low:
        high = low + max(low * 0.01, 1e-6)
    counts, edges = np.histogram(values, _BINS, (low, high))
    step = _WIDE / _BINS
    most = int(counts.max())
    bars = [
        h(
            "rect",
            x=f"{i * step + 0.5:.1f}",
            y=f"{_HIGH - _HIGH * n / most:.1f}",
            width=f"{step - 1:.1f}",
            height=f"{_HIGH * n / most:.1f}",
            fill="var(--ll-0)",
        )
        for i, n in enumerate(counts)
        if n
    ]
    marks = []
    for share, line in ((50, -18), (99, -4)):
        value = float(np.percentile(values, share))
        x = (value - low) / (high - low) * _WIDE
        anchor = "end" if x > _WIDE / 2 else "start"
        marks.append(
            h(
                "line",
                x1=f"{x:.1f}",
                x2=f"{x:.1f}",
                y1=line - 10,
                y2=_HIGH,
                stroke="var(--ll-5)",
                stroke_dasharray="3 2",
            )
        )
        marks.append(
            h(
                "text",
                f"p{share} {value:.2f} ms",
                x=f"{x + (-4 if anchor == 'end' else 4):.1f}",
                y=line,
                text_anchor=anchor,
            )
        )
    axis = [
        h("line", x1=0, x2=_WIDE, y1=_HIGH, y2=_HIGH, stroke="var(--ll-line)"),
        h("text", f"{edges[0]:.2f} ms", x=0, y=_HIGH + 14, class_="soft"),
        h("text", f"{edges[-1]:.2f} ms", x=_WIDE, y=_HIGH + 14, text_anchor="end", class_="soft"),
    ]
    said = f"{label}: {len(values)} values from {low:.2f} to {high:.2f} ms, most often {edges[int(counts.argmax())]:.2f} ms"
    return h(
        "svg",
        h("title", said),
        bars,
        marks,
        axis,
        class_="plot",
        viewBox=f"0 {-_ABOVE} {_WIDE} {_ABOVE + _HIGH + 18}",
        width=_WIDE,
        role="img",
        aria_label=said,
    )
