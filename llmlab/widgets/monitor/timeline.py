"""The timeline of requests over steps, with the batch below it, as one SVG."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from llmlab.runtime.trace import SequenceRecord, StepRecord, Trace
from llmlab.widgets.markup import Attribute, control, h

COLUMNS = 40
ROWS = 20
CELL, ROW, LEFT, TOP = 20, 20, 132, 18
CHART = 44
COLOURS = 8

MEANINGS = {
    "waiting": ("w", "waiting for a place or for KV blocks"),
    "prefill": ("P12", "prefill: so many tokens of its prompt, or of what it has to compute again"),
    "decode": ("d", "decode: one token of its answer"),
    "held": ("–", "runs, and no token of this step was left for it"),
    "preempted": ("X", "preempted: it lost its KV blocks and waits to be computed again"),
    "ended": ("✗", "cancelled or failed"),
    "done": ("d✓", "its last token"),
}
"""What is written in a cell, and what it means."""


def colour(name: str, strength: int = 100) -> str:
    """A sequence's colour, the same everywhere."""
    digits = "".join(c for c in name.partition(".")[0] if c.isdigit())
    base = f"var(--ll-{(int(digits or 1) - 1) % COLOURS})"
    return base if strength == 100 else f"color-mix(in srgb, {base} {strength}%, var(--ll-page))"


def timeline(trace: Trace, shown: Sequence[StepRecord], looked: int | None, prompts: dict[str, str]) -> Markup:
    """The last steps of `shown`. looked: index of the step whose blocks are drawn. prompts: of the sequences, by name."""
    first = max(0, len(shown) - COLUMNS)
    if looked is not None and looked < first:
        first = looked
    steps = list(enumerate(shown[first : first + COLUMNS], first))
    names = list(dict.fromkeys(s.name for _, step in steps for s in step.sequences))
    left_out, names = max(0, len(names) - ROWS), names[-ROWS:]
    bottom = TOP + ROW * max(len(names), 1)
    height = bottom + 2 * CHART + 8
    width = LEFT + CELL * max(len(steps), 12) + 8
    parts: list[Markup] = [_patterns()]
    if looked is not None and first <= looked < first + len(steps):
        x = LEFT + CELL * (looked - first)
        parts.append(h("rect", x=x, y=0, width=CELL, height=height, fill="var(--ll-fill)", stroke="var(--ll-accent)"))
    for place, name in enumerate(names):
        parts.append(_label(0, TOP + ROW * place + 14, f"{name}  {prompts.get(name, '')}", 20))
    for index, step in steps:
        x = LEFT + CELL * (index - first)
        if index == first or index % 5 == 0:
            parts.append(h("text", index + 1, x=x + CELL / 2, y=12, text_anchor="middle", class_="soft"))
        by_name = {s.name: s for s in step.sequences}
        for place, name in enumerate(names):
            if name in by_name:
                parts.append(_cell(by_name[name], x, TOP + ROW * place))
        parts += _bars(trace, step, index, x, bottom)
        said = _said(step, index)
        hit: dict[str, Attribute] = {
            "x": x,
            "y": 0,
            "width": CELL,
            "height": height,
            "fill": "transparent",
            "tabindex": 0,
            "role": "button",
        }
        here = "step" if index == looked else None
        parts.append(
            h("rect", h("title", said), **hit, aria_label=said, aria_current=here, **control("look", str(index)))
        )
    parts += _axis(trace, bottom, width)
    picture = h(
        "svg",
        parts,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="group",
        aria_label=f"Timeline of {len(names)} requests over steps {first + 1} to {first + len(steps)}",
    )
    note = h("small", f"{left_out} earlier requests aren't shown") if left_out else None
    return h("div", h("div", picture, class_="wide", data_scroll="timeline", data_walk="row"), note, _legend())


def cell_text(record: SequenceRecord) -> str:
    """What is written in the cell of one sequence and step."""
    done = "✓" if record.finish_reason in ("stop", "length") else "✗" if record.finish_reason else ""
    if record.state == "prefill":
        return f"P{record.count}{done}"
    if record.state == "ended":
        return "✗"
    return MEANINGS[record.state][0] + done


def _cell(record: SequenceRecord, x: float, y: float) -> Markup:
    works = record.count > 0
    style = f"fill:{colour(record.name, 62 if record.state == 'decode' else 34)}" if works else "fill:none"
    line = "var(--ll-bad)" if record.state in ("preempted", "ended") else "var(--ll-line)"
    dashes = None if works else "2 2"
    box = {"x": x + 1, "y": y + 1, "width": CELL - 2, "height": ROW - 2}
    parts = [h("rect", **box, style=style, stroke=line, stroke_dasharray=dashes, rx=2)]
    if record.state == "prefill":
        parts.append(h("rect", **box, fill="url(#ll-hatch)", rx=2))
    soft = None if works or record.state == "preempted" else "soft"
    text = cell_text(record)
    parts.append(
        h(
            "text",
            text,
            x=x + CELL / 2,
            y=y + 14,
            text_anchor="middle",
            class_=soft,
            style=f"font-size:{8 if len(text) > 3 else 9}px",
        )
    )
    return h("g", parts, data_cell=record.state, data_of=record.name)


def _bars(trace: Trace, step: StepRecord, index: int, x: float, bottom: float) -> list[Markup]:
    """Sequences in the batch, and tokens of the step: prefill hatched, decode full."""
    room, parts = CHART - 12, []
    high = room * step.num_running / trace.max_num_seqs
    y = bottom + CHART
    parts.append(h("rect", x=x + 3, y=y - high, width=CELL - 6, height=high, fill="var(--ll-soft)"))
    y += CHART
    scale = room / trace.max_tokens_per_step
    decode, prefill = scale * step.decode_tokens, scale * step.prefill_tokens
    parts.append(h("rect", x=x + 3, y=y - decode, width=CELL - 6, height=decode, fill="var(--ll-accent)"))
    box = {"x": x + 3, "y": y - decode - prefill, "width": CELL - 6, "height": prefill}
    parts.append(h("rect", **box, style="fill:color-mix(in srgb, var(--ll-accent) 35%, var(--ll-page))"))
    parts.append(h("rect", **box, fill="url(#ll-hatch)"))
    return parts


def _axis(trace: Trace, bottom: float, width: float) -> list[Markup]:
    parts = []
    rows = (("sequences", trace.max_num_seqs), ("tokens", trace.max_tokens_per_step))
    for place, (what, most) in enumerate(rows):
        low = bottom + CHART * (place + 1)
        for y, dashes in ((low, None), (low - CHART + 12, "3 3")):
            line = {"x1": LEFT, "x2": width - 8, "y1": y, "y2": y}
            parts.append(h("line", **line, stroke="var(--ll-line)", stroke_dasharray=dashes))
        parts.append(h("text", f"{what} a step", x=0, y=low - 8))
        parts.append(h("text", f"at most {most}", x=LEFT - 6, y=low - CHART + 16, text_anchor="end", class_="soft"))
    return parts


def _said(step: StepRecord, index: int) -> str:
    lines = [
        f"step {index + 1}: {step.num_running} sequences, {step.prefill_tokens} tokens of prefill and "
        f"{step.decode_tokens} of decode, {1e3 * step.seconds:.0f} ms"
    ]
    for s in step.sequences:
        what = MEANINGS[s.state][1].partition(":")[0]
        cached = f", {s.cached} tokens were there already" if s.cached else ""
        end = f", ended: {s.finish_reason}" if s.finish_reason else ""
        lines.append(f"{s.name}: {what}" + (f" of {s.count}" if s.count else "") + cached + end)
    return "\n".join(lines)


def _label(x: float, y: float, text: str, most: int) -> Markup:
    short = text if len(text) <= most else text[: most - 1] + "…"
    return h("text", h("title", text), short, x=x, y=y)


def _patterns() -> Markup:
    stripe = h("path", d="M0 6L6 0", stroke="var(--ll-ink)", stroke_opacity="0.35")
    return h("defs", h("pattern", stripe, id="ll-hatch", width=6, height=6, patternUnits="userSpaceOnUse"))


def _legend() -> Markup:
    items = [h("span", h("code", text), f" {meaning}") for text, meaning in MEANINGS.values()]
    return h(
        "details",
        h("summary", "What the letters mean"),
        h("div", items, class_="legend"),
        data_keep="legend",
        open=True,
    )
