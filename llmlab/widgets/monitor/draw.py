"""How the rest of the monitor looks: the status line, the map of KV blocks, the table of requests, the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from markupsafe import Markup

from llmlab.runtime.trace import BlockRecord, SequenceRecord, StepRecord, Trace
from llmlab.widgets.markup import Attribute, button, checkbox, control, h, select, slider
from llmlab.widgets.monitor.timeline import MEANINGS, colour

if TYPE_CHECKING:
    from llmlab.widgets.monitor.traffic import Knobs, Traffic

MOST_BLOCKS = 256
MOST_REQUESTS = 24
ACROSS, SIDE = 16, 40


def controls(playing: bool, speed: float, replay: bool) -> Markup:
    """Play, pause, step and the rest."""
    play = button("Pause" if playing else "Play", "pause" if playing else "play", class_="main")
    again = button("Again from the start", "again", title="The same requests at the same steps")
    clear = None if replay else button("Clear", "clear", title="Forget all requests")
    step = button("Step", "step", disabled=playing, title="One step of the scheduler")
    pace = slider("Speed", "speed", 0.5, 10, speed, step=0.5, text=f"{speed:g} steps a second")
    return h("div", play, step, again, clear, pace, class_="bar live-only")


def knobs(values: Knobs | None, trace: Trace) -> Markup:
    """The core's settings; values: None where a trace is replayed."""
    said = (
        f"At most {trace.max_num_seqs} sequences and {trace.max_tokens_per_step} tokens a step, {trace.num_blocks} KV blocks "
        f"of {trace.block_size} tokens, prefix cache {'on' if trace.prefix_cache else 'off'}, {trace.batching} batching."
    )
    if values is None:
        return h("p", said, class_="soft")
    given, fields = asdict(values), []
    for key, label in (
        ("max_num_seqs", "Most sequences"),
        ("max_tokens_per_step", "Most tokens a step"),
        ("kv_blocks", "KV blocks"),
    ):
        box = h("input", type="number", min=1, step=1, value=given[key], class_="short", **control("knob", key))
        fields.append(h("label", f"{label} ", box))
    fields.append(checkbox("Prefix cache", "prefix", values.prefix_cache))
    batching = [("inflight", "in flight"), ("static", "static")]
    fields.append(select("Batching", "batching", batching, values.batching))
    note = h("small", "Changing one begins again, with the same requests.")
    return h("div", h("p", said, class_="soft static-only"), h("div", fields, note, class_="bar live-only"))


def status(trace: Trace, steps: Sequence[StepRecord], looked: int, note: str) -> Markup:
    """The light, and what the step was that is looked at."""
    if not steps:
        return h("p", note or "No step yet.")
    step = steps[looked]
    bad = bool(step.integrity)
    words = f"Books don't balance: {step.integrity}" if bad else "Books balance: every block is free, cached or owned"
    light = h("span", h("span", class_="light bad" if bad else "light"), words, class_="integrity", role="status")
    used = sum(bool(b.owners) for b in step.blocks)
    facts = (
        f"Step {looked + 1} of {len(steps)}: {step.num_running} sequences, {step.prefill_tokens} + {step.decode_tokens} tokens "
        f"(prefill + decode), {used} of {trace.num_blocks} blocks used, {step.shared_blocks} shared"
        + (f", {step.cached_tokens} tokens from the prefix cache" if step.cached_tokens else "")
        + (f", {step.preemptions} preempted" if step.preemptions else "")
        + "."
    )
    look = slider("Look at step", "look", 1, len(steps), looked + 1) if len(steps) > 1 else None
    return h("div", h("div", light, h("span", facts), look, class_="bar"), h("p", h("b", note)) if note else None)


def block_map(trace: Trace, step: StepRecord | None) -> Markup:
    """All KV blocks after a step, coloured by owner; shared ones say so."""
    if step is None:
        return Markup("")
    blocks = step.blocks[:MOST_BLOCKS]
    holds = {(b, s.name): place for s in step.sequences for place, b in enumerate(s.blocks)}
    rows = -(-len(blocks) // ACROSS)
    cells = [_block(trace, block, i, holds) for i, block in enumerate(blocks)]
    width, height = ACROSS * SIDE, rows * SIDE
    shared = step.shared_blocks
    picture = h(
        "svg",
        cells,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=f"{trace.num_blocks} KV blocks, {shared} shared",
    )
    words = (
        "Each square is a KV block, filled as far as it holds tokens. The number is the request that owns it; several numbers: a "
        "prefix that they share. Hatched with “c”: cached, nobody's now, kept for prompts that begin alike. Empty: free."
    )
    more = f" {len(step.blocks) - MOST_BLOCKS} more aren't drawn." if len(step.blocks) > MOST_BLOCKS else ""
    return h("div", h("h4", "KV blocks"), h("div", picture, class_="wide"), h("small", words + more))


def requests(traffic: Traffic | None, last: Sequence[SequenceRecord]) -> Markup:
    """What was asked, and what came of it; nothing of a recorded run. last: the requests in the step that is looked at."""
    if traffic is None:
        return Markup("")
    states = {record.name: MEANINGS[record.state][1].partition(":")[0] for record in last}
    shown = traffic.submissions[-MOST_REQUESTS:]
    if not shown:
        return h("p", "No request yet: submit some.", class_="soft")
    rows = []
    for s in shown:
        output = traffic.outputs.get(s.name)
        state = (output and output.finish_reason) or states.get(s.name, f"comes before step {s.step + 1}")
        cancel = None if output and output.finish_reason else button("Cancel", "cancel", s.name)
        swatch = h("span", class_="swatch", style=f"background:{colour(s.name)}")
        answer = (output.error or output.text) if output else ""
        rows.append(
            h(
                "tr",
                h("td", swatch, s.name),
                h("td", s.prompt),
                h("td", state, " ", cancel),
                h("td", f"{len(s.prompt_ids)} + {output.num_tokens if output else 0}", class_="number"),
                h("td", answer),
            )
        )
    heads = ("request", "prompt", "state", "tokens (in + out)", "answer")
    return h("div", h("table", h("tr", [h("th", head) for head in heads]), rows), class_="wide")


def submit(text: str) -> Markup:
    """Where requests are typed."""
    box = h(
        "textarea",
        text,
        name="prompts",
        rows=3,
        aria_label="Prompts, one a line",
        placeholder="Prompts, one a line",
        data_draft="prompts",
    )
    number: dict[str, Attribute] = {"type": "number", "name": "max_tokens", "min": 1, "step": 1, "value": 16}
    most = h("label", "Max tokens ", h("input", **number, data_draft="max_tokens", class_="short"))
    send = h("button", "Submit", type="submit", class_="main")
    return h("form", box, h("div", send, most, class_="bar"), class_="live-only", **control("submit"))


def _block(trace: Trace, block: BlockRecord, index: int, holds: Mapping[tuple[int, str], int]) -> Markup:
    x, y = index % ACROSS * SIDE + 2, index // ACROSS * SIDE + 2
    side = SIDE - 4
    high = side * block.filled / trace.block_size
    box: dict[str, Attribute] = {"x": x, "y": y, "width": side, "height": side, "rx": 3}
    fill: dict[str, Attribute] = {"x": x, "y": y + side - high, "width": side, "height": high, "rx": 2}
    parts: list[Markup] = []
    if block.owners:
        parts.append(h("rect", **fill, style=f"fill:{colour(block.owners[0], 50)}"))
        if len(block.owners) > 1:  # the other owner's colour in the right half, and a bold frame
            half: dict[str, Attribute] = {**fill, "x": x + side / 2, "width": side / 2}
            parts.append(h("rect", **half, style=f"fill:{colour(block.owners[1], 50)}"))
    elif block.cached:
        parts += [h("rect", **fill, fill="var(--ll-fill)"), h("rect", **fill, fill="url(#ll-hatch)")]
    bold = len(block.owners) > 1
    line = "var(--ll-ink)" if bold else "var(--ll-line)"
    parts.append(h("rect", **box, fill="none", stroke=line, stroke_width=2 if bold else 1))
    label = "+".join(block.owners[:2]) + (f"+{len(block.owners) - 2}" if len(block.owners) > 2 else "")
    text = label or ("c" if block.cached else "")
    size = 12 if len(text) < 5 else 9
    parts.append(h("text", text, x=x + side / 2, y=y + 23, text_anchor="middle", style=f"font-size:{size}px"))
    if bold:
        parts.append(
            h("text", f"×{len(block.owners)}", x=x + side - 2, y=y + 11, text_anchor="end", style="font-size:9px")
        )
    state = "shared" if bold else "used" if block.owners else "cached" if block.cached else "free"
    return h("g", h("title", _explained(trace, block, index, holds)), parts, data_block=index, data_state=state)


def _explained(trace: Trace, block: BlockRecord, index: int, holds: Mapping[tuple[int, str], int]) -> str:
    if not block.owners:
        if block.cached:
            return f"block {index}: cached, {block.filled} tokens that a prompt may begin with"
        return f"block {index}: free"
    place = holds.get((index, block.owners[0]), 0) * trace.block_size
    owners = ", ".join(block.owners)
    count = f"shared by {len(block.owners)} requests: {owners}" if len(block.owners) > 1 else f"request {owners}"
    return (
        f"block {index}: {count}; tokens {place + 1} to {place + block.filled}"
        if block.filled
        else f"block {index}: {count}; no token yet"
    )
