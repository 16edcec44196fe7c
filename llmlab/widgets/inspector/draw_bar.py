"""The inspector's controls, hit list and legend."""

from __future__ import annotations

from markupsafe import Markup

from llmlab.widgets.inspector.overlays import PrecisionOverlay
from llmlab.widgets.inspector.search import SHOWN
from llmlab.widgets.inspector.state import InspectorState
from llmlab.widgets.markup import button, control, h, select


def bar(panel: InspectorState) -> Markup:
    search = h(
        "input",
        type="search",
        placeholder="node, operator, tensor, weight",
        data_draft="search",
        value=panel.query or None,
        **control("search"),
    )
    context = h(
        "input",
        type="range",
        min=0,
        max=17,
        value=panel.context.bit_length() - 1,
        aria_valuetext=f"{panel.context} tokens",
        **control("context"),
    )
    chosen = select("show", "overlay", [(o.name, o.label) for o in panel.overlays.values()], panel.overlay.name)
    slider = h("label", "context length ", context, class_="live-only") if panel.overlay.name == "flops" else None
    measure = button("Measure", "measure", disabled=bool(panel.working)) if panel.engine is not None else None
    return h(
        "div",
        h("h3", panel.title()),
        h("div", h("label", "search ", search, class_="live-only"), chosen, slider, measure, class_="bar"),
    )


def hits(panel: InspectorState) -> Markup:
    if not panel.query.strip() or panel.is_static:
        return Markup("")
    if not panel.hits:
        return h("p", f"nothing is called “{panel.query}”", class_="soft", role="status")
    rows = [
        h(
            "div",
            h("span", hit.kind, class_="badge"),
            f" {hit.text}",
            h("span", f" ×{hit.count}", class_="soft") if hit.count > 1 else None,
            role="option",
            tabindex=0,
            class_="row",
            **control("go", hit.node, data_hit=hit.text),
        )
        for hit in panel.hits
    ]
    more = f", the first {SHOWN} lines" if len(panel.hits) == SHOWN else ""
    return h(
        "div",
        h("small", f"{panel.found:,} found{more}", role="status"),
        h("div", rows, role="listbox", aria_label="hits", data_walk="column", class_="scroll hits", data_scroll="hits"),
    )


def legend(panel: InspectorState) -> Markup:
    overlay = panel.overlay
    parts: list[Markup | str | None] = [h("b", overlay.label), f": {overlay.says}. "]
    if overlay.missing:
        parts.append(h("span", overlay.missing, class_="badge"))
    elif isinstance(overlay, PrecisionOverlay):
        for kind in overlay.kinds:
            color = overlay.color_of(kind)
            parts.append(
                Markup(" ") + h("span", h("span", class_="swatch", style=f"background:{color}"), kind, class_="badge")
            )
    else:
        steps = [
            h("span", class_="swatch", style=f"background:color-mix(in srgb, var(--ll-5) {p}%, var(--ll-page))")
            for p in (8, 26, 44, 62, 80)
        ]
        if overlay.name == "error":
            bar, box = f"the largest, {panel.whole:.2%}", "the largest"
        else:
            bar, box = f"the whole, {overlay.text(panel.whole)}", "the largest box of the picture"
        parts += [
            h("span", "0 ", steps, box, class_="badge"),
            Markup(" "),
            h("span", f"a full bar is {bar}", class_="badge"),
        ]
    if panel.working:
        parts += [f" {panel.working} ", button("Stop", "stop")]
    return h("div", h("small", parts))
