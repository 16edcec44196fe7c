"""The engine view's HTML."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from llmlab.evaluate.layers.align import PairRow
from llmlab.evaluate.layers.model import CompiledLayer, EngineLayers, Row, microseconds, milliseconds
from llmlab.widgets.engine_view.state import SORTS, EngineViewState
from llmlab.widgets.markup import button, control, copies, h, select

_MOST_ROWS = 300
_COLOURS = {"attention": 0, "product": 1, "experts": 5, "norm": 2, "embedding": 4, "rest": 7}


def head(view: EngineViewState) -> Markup:
    """Title, what was run, and the controls."""
    sorts = [(key, text) for key, text in SORTS.items() if key != "difference" or len(view.measured) == 2]
    blocks = [("", "all layers"), *((block, block) for block in view.blocks())]
    search = h("input", type="search", value=view.search, placeholder="node, kernel, precision", **control("search"))
    measuring = view.status == "measuring"
    again = button("Stop", "stop") if measuring else button("Measure again", "measure", disabled=not view.engines)
    controls = h(
        "div",
        select("step", "phase", [("decode", "decode"), ("prefill", "prefill")], view.phase),
        select("sort", "sort", sorts, view.sort),
        select("layer", "block", blocks, view.block),
        h("label", "search ", search, class_="live-only"),
        again,
        class_="bar live-only",
    )
    status = h("p", view.status, role="status") if view.status else None
    scripts = [copies(f"copy the script of {name}", text, "the Python that rebuilds it") for name, text in view.scripts]
    facts = [_facts(view, m) for m in view.measured]
    return h("div", h("h3", view.title()), facts, controls, h("div", scripts, class_="bar live-only"), status)


def _facts(view: EngineViewState, found: EngineLayers) -> Markup:
    said = [f"{found.engine}: {len(found.layers)} layers on {found.target}"]
    if found.phases:
        run, phase = found.settings, view.phase
        what = (
            f"a prompt of {run['prompt']} tokens"
            if phase == "prefill"
            else f"{run['batch']} token after {run['context']}"
        )
        if phase == "decode" and run["batch"] != 1:
            what = f"a token of each of {run['batch']} sequences after {run['context']}"
        said.append(f"{phase} ({what}): {milliseconds(found.step[phase])} a step" if phase in found.step else "")
        if phase in found.between:
            said.append(f"with each layer timed, {microseconds(found.between[phase])} of a step lie between kernels")
        if "threads" in run:
            said.append(f"{run['threads']} thread{'' if run['threads'] == 1 else 's'}")
    notes = [h("p", h("small", note)) for note in found.notes]
    return h("div", h("p", "; ".join(filter(None, said))), notes)


def totals(view: EngineViewState) -> Markup:
    """Where the time goes by kind and by precision, and what was folded away."""
    parts = []
    for found in view.measured:
        kinds = found.totals(lambda layer: layer.kind, view.phase)
        types = found.totals(lambda layer: layer.dtype, view.phase)
        title = h("h4", found.engine) if len(view.measured) == 2 else None
        parts.append(
            h(
                "div",
                title,
                _share("by kind", kinds, found, view.phase),
                _share("by precision", types, found, view.phase),
            )
        )
    return h("div", parts, class_="columns" if len(parts) == 2 else None)


def _share(label: str, sums: dict[str, float], found: EngineLayers, phase: str) -> Markup:
    whole = sum(sums.values()) or 1.0
    measured = phase in found.phases
    rows = [
        h(
            "tr",
            h("td", _swatch(name) if name in _COLOURS else None, name),
            h("td", microseconds(amount) if measured else f"{amount:.0f} layers", class_="number"),
            h("td", f"{amount / whole:.0%}" if measured else "", class_="number"),
        )
        for name, amount in sums.items()
    ]
    return h("table", h("caption", label), rows, class_="ev-share")


def rows(view: EngineViewState) -> Markup:
    """A bar for each row, unfolding to what it was made of."""
    found = view.rows()
    if not found:
        return h("p", "nothing is called that: search for less", class_="soft")
    shown = found[:_MOST_ROWS]
    left = (
        h("p", f"{len(found) - len(shown)} more rows: search, or choose a layer") if len(found) > len(shown) else None
    )
    drawn = [_pair(view, row) if isinstance(row, PairRow) else _single(view, row) for row in shown]
    legend = None
    if len(view.measured) == 2:
        one, two = (m.engine for m in view.measured)
        legend = h(
            "p", f"left: {one}, right: {two}; won and lost are {two}'s, for all layers of a row together", class_="soft"
        )
    folded = [_folded(m) for m in view.measured]
    return h("div", legend, h("div", drawn, data_walk="column", class_="ev-rows"), left, folded)


def _most(view: EngineViewState, times: Sequence[float | None]) -> float:
    return max((t for t in times if t), default=0.0) or 1.0


def _single(view: EngineViewState, row: Row) -> Markup:
    all_rows = view.measured[0].rows(lambda layer: view.phase in layer.phases)
    longest = _most(view, [r.seconds(view.phase) for r in all_rows])
    seconds = row.seconds(view.phase)
    whole = sum(r.seconds(view.phase) or 0.0 for r in all_rows) or 1.0
    time = "" if seconds is None else f"{microseconds(seconds)}, {seconds / whole:.1%}"
    each = row.each(view.phase) if len(row.layers) > 1 and seconds is not None else ""
    line = h(
        "summary",
        h("span", _swatch(row.first.kind), row.name, class_="ev-name"),
        h("span", row.first.dtype, class_="badge"),
        h("span", _bar(seconds, longest, row.first.kind, row.first.kind), class_="ev-track"),
        h("span", time, f" ({each} each)" if each else "", class_="ev-time number"),
        class_="ev-row",
    )
    return h("details", line, _made_of(view, list(row.layers)), data_keep=row.name)


def _pair(view: EngineViewState, row: PairRow) -> Markup:
    both = view.alignment
    longest = _most(view, [r.seconds(s, view.phase) for r in (both.rows() if both else []) for s in (0, 1)])
    word, text = row.verdict(view.phase)
    times = [row.seconds(side, view.phase) for side in (0, 1)]
    cells = [
        h(
            "span",
            "" if t is None else microseconds(t),
            " ",
            h("span", row.dtype(side), class_="badge"),
            class_="ev-time",
        )
        for side, t in enumerate(times)
    ]
    left = h("span", _bar(times[0], longest, row.kind, "first engine"), class_="ev-track ev-left")
    right = h("span", _bar(times[1], longest, row.kind, "second engine"), class_="ev-track")
    line = h(
        "summary",
        h("span", _swatch(row.kind), row.name, class_="ev-name"),
        h("span", text, class_=f"badge ev-{word}" if word else "badge"),
        h("span", cells[0], left, right, cells[1], class_="ev-pair"),
        class_="ev-row ev-two",
    )
    sides = [h("div", h("h4", view.measured[side].engine), _made_of(view, row.layers(side))) for side in (0, 1)]
    return h("details", line, h("div", sides, class_="columns ev-sides"), data_keep=row.name)


def _made_of(view: EngineViewState, given: list[CompiledLayer]) -> Markup:
    """The serving nodes and kernels of the first layer, and the times of all."""
    if not given:
        return h("p", "nothing here", class_="soft")
    first = given[0]
    alike = [layer for layer in given if layer.alike == first.alike]
    others = [layer for layer in given if layer.alike != first.alike and layer.layer == first.layer]
    parts = [_layer(view, layer) for layer in (first, *others)]
    if len(alike) > 1 and view.phase in first.seconds:
        times = ", ".join(
            f"{layer.layer.rpartition('.')[2]}: {microseconds(layer.seconds[view.phase])}" for layer in alike
        )
        parts.append(h("p", "each layer: ", times, class_="soft"))
    return h("div", parts, class_="ev-made")


def _layer(view: EngineViewState, layer: CompiledLayer) -> Markup:
    nodes = (
        h("ul", [h("li", h("code", node)) for node in layer.nodes]) if layer.nodes else h("p", "the compiler added it")
    )
    facts = [f"runs {', '.join(layer.kernels)}" if layer.kernels else "", f"in {layer.dtype}" if layer.dtype else ""]
    if layer.weight_bytes:
        facts.append(f"weights {layer.weight_bytes:,} bytes")
    if layer.flops.get(view.phase):
        facts.append(f"{layer.flops[view.phase]:,} operations")
    if layer.bytes.get(view.phase):
        facts.append(f"moves {layer.bytes[view.phase]:,} bytes")
    return h(
        "div",
        h("p", h("code", layer.name), ": ", "; ".join(filter(None, facts))),
        h("p", "of the serving graph:"),
        nodes,
    )


def _folded(found: EngineLayers) -> Markup | None:
    if not found.folded:
        return None
    names = [h("li", h("code", name)) for name in found.folded[:_MOST_ROWS]]
    count = len(found.folded)
    which = "1 node of the serving graph was computed before it runs, or is" if count == 1 else ""
    which = which or f"{count} nodes of the serving graph were computed before it runs, or are"
    title = f"{found.engine}: {which} of no use"
    return h("details", h("summary", title), h("ul", names), data_keep=f"folded {found.engine}")


def _bar(seconds: float | None, longest: float, kind: str, label: str) -> Markup | None:
    if seconds is None:
        return None
    style = f"width:{max(0.3, 100 * seconds / longest):.1f}%;background:var(--ll-{_COLOURS.get(kind, 7)})"
    return h("span", class_="ev-bar", style=style, title=f"{label}: {microseconds(seconds)}")


def _swatch(kind: str) -> Markup:
    return h("span", class_="swatch", style=f"background:var(--ll-{_COLOURS.get(kind, 7)})", title=kind)
