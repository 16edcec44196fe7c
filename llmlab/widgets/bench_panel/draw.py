"""The bench panel's HTML and SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from llmlab.evaluate.latencies import Latencies
from llmlab.evaluate.layers.model import milliseconds
from llmlab.evaluate.roofline import Roofline
from llmlab.widgets.bench_panel.state import BenchState
from llmlab.widgets.markup import button, h

_BINS = 24
_WIDE, _HIGH = 360, 96


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
    heads = ("sequences", "first token p50", "p90", "between tokens p50", "p90", "p99", "tokens/s")
    body = []
    for row in panel.rows:
        cells = [str(row.batch)]
        cells += [milliseconds(row.percentile("first_token", share)) for share in (50, 90)]
        cells += [milliseconds(row.percentile("between_tokens", share)) for share in (50, 90, 99)]
        body.append(h("tr", [h("td", cell, class_="number") for cell in (*cells, f"{row.tokens_per_s:,.0f}")]))
    table = h("table", h("tr", [h("th", head, scope="col", class_="number") for head in heads]), body)
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
    for share, line in ((50, 12), (99, 26)):
        value = float(np.percentile(values, share))
        x = (value - low) / (high - low) * _WIDE
        anchor = "end" if x > _WIDE / 2 else "start"
        marks.append(
            h("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=0, y2=_HIGH, stroke="var(--ll-5)", stroke_dasharray="3 2")
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
        viewBox=f"0 0 {_WIDE} {_HIGH + 18}",
        width=_WIDE,
        role="img",
        aria_label=said,
    )


def roofline(panel: BenchState) -> Markup:
    """Operations a second over operations a byte, both logarithmic: the machine's ceilings and the engine's steps."""
    if panel.roofline is None:
        return h("p", panel.note, class_="soft") if panel.note else Markup("")
    roof = panel.roofline
    rows = [
        h(
            "tr",
            h("td", point.label),
            h("td", f"{point.intensity:,.1f}", class_="number"),
            h("td", f"{point.flops_per_s / 1e9:,.2f}", class_="number"),
            h("td", f"{point.flops_per_s / roof.limit(point.intensity):.0%}", class_="number"),
            h("td", f"{point.bytes / point.seconds / 1e9:,.2f}", class_="number"),
            h("td", "memory" if point.intensity < roof.ridge else "arithmetic"),
        )
        for point in panel.points
    ]
    heads = ("step", "operations a byte", "Gop/s", "of the float32 roof", "GB/s", "limited by")
    table = h("table", h("tr", [h("th", head, scope="col") for head in heads]), rows) if rows else None
    said = (
        f"This machine reads {roof.bytes_per_s / 1e9:.1f} GB/s and does {roof.flops_per_s / 1e9:.0f} Gop/s in float32, "
        f"{roof.int8_ops_per_s / 1e9:.0f} in int8; below {roof.ridge:.1f} operations a byte, memory is the limit."
    )
    above = [p.label for p in panel.points if p.flops_per_s > p.intensity * roof.bytes_per_s]
    cached = (
        f"Above the line of the memory: {', '.join(above)}. What is read there fits the processor's caches."
        if above
        else ""
    )
    note = h("p", " ".join(filter(None, (cached, panel.note)))) if cached or panel.note else None
    return h(
        "div",
        h("h4", "Roofline"),
        h("p", said),
        _plot(panel, roof),
        h("div", table, class_="wide"),
        note,
        h("p", h("small", roof.method)),
    )


def _plot(panel: BenchState, roof: Roofline) -> Markup:
    wide, high, left, below = 560, 240, 46, 28
    across = [roof.ridge, *(p.intensity for p in panel.points)]
    up = [roof.int8_ops_per_s, roof.flops_per_s, *(p.flops_per_s for p in panel.points)]
    x0, x1 = math.floor(math.log10(min(across) / 2)), math.ceil(math.log10(max(across) * 4))
    y1 = math.ceil(math.log10(max(up) * 1.1))
    y0 = math.floor(math.log10(min([*up, roof.bytes_per_s * 10**x0])))

    def x(value: float) -> float:
        return left + (math.log10(value) - x0) / (x1 - x0) * (wide - left - 8)

    def y(value: float) -> float:
        return high - below - (math.log10(value) - y0) / (y1 - y0) * (high - below - 12)

    parts: list[Markup] = []
    for power in range(x0, x1 + 1):
        parts.append(
            h(
                "line",
                x1=f"{x(10**power):.1f}",
                x2=f"{x(10**power):.1f}",
                y1=12,
                y2=high - below,
                stroke="var(--ll-line)",
            )
        )
        parts.append(
            h(
                "text",
                f"{10.0**power:g}",
                x=f"{x(10**power):.1f}",
                y=high - below + 14,
                text_anchor="middle",
                class_="soft",
            )
        )
    for power in range(y0, y1 + 1):
        parts.append(
            h(
                "line",
                x1=left,
                x2=wide - 8,
                y1=f"{y(10.0**power):.1f}",
                y2=f"{y(10.0**power):.1f}",
                stroke="var(--ll-line)",
            )
        )
        parts.append(
            h("text", _ops(10.0**power), x=left - 4, y=f"{y(10.0**power) + 4:.1f}", text_anchor="end", class_="soft")
        )
    near = abs(y(roof.flops_per_s) - y(roof.int8_ops_per_s)) < 14
    lower = min(roof.flops_per_s, roof.int8_ops_per_s)
    for ceiling, name, dash in ((roof.flops_per_s, "float32", None), (roof.int8_ops_per_s, "int8", "6 3")):
        bend = ceiling / roof.bytes_per_s
        path = f"M{x(10.0**x0):.1f},{y(roof.bytes_per_s * 10.0**x0):.1f} L{x(bend):.1f},{y(ceiling):.1f} L{wide - 8},{y(ceiling):.1f}"
        if bend < 10.0**x1:
            parts.append(
                h("path", d=path, fill="none", stroke="var(--ll-ink)", stroke_width=1.5, stroke_dasharray=dash)
            )
            place = y(ceiling) + 13 if near and ceiling == lower else y(ceiling) - 4
            parts.append(h("text", name, x=wide - 10, y=f"{place:.1f}", text_anchor="end"))
    for number, point in enumerate(panel.points):
        px, py = x(point.intensity), y(point.flops_per_s)
        parts.append(h("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=5, fill=f"var(--ll-{number % 8})"))
        anchor, shift = ("end", -9) if px > wide * 0.7 else ("start", 9)
        parts.append(h("text", point.label, x=f"{px + shift:.1f}", y=f"{py + 14:.1f}", text_anchor=anchor))
    label = h(
        "text", "operations a byte", x=f"{(wide + left) / 2:.0f}", y=high - 1, text_anchor="middle", class_="soft"
    )
    said = "Roofline: " + "; ".join(
        f"{p.label}: {p.intensity:.1f} operations a byte, {_ops(p.flops_per_s)}op/s" for p in panel.points
    )
    return h(
        "svg", h("title", said), parts, label, viewBox=f"0 0 {wide} {high}", width=wide, role="img", aria_label=said
    )


def _ops(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:g} {name}" if value / unit < 1000 else f"{value / unit:.0f} {name}"
    return f"{value:g} "
