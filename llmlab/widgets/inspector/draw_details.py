"""What there is to say about one node, or about a group while no node is chosen."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from markupsafe import Markup

from llmlab.graph.quantized import QuantizedWeight, quantized
from llmlab.graph.reports.snapshot import attribute_text, kind_of
from llmlab.widgets.inspector.hierarchy import Group, Leaf
from llmlab.widgets.inspector.sizes import is_weight, number_text, tensor_bytes
from llmlab.widgets.inspector.state import InspectorState
from llmlab.widgets.inspector.values import Histogram
from llmlab.widgets.markup import button, h

_READERS = 12


def details(panel: InspectorState) -> Markup:
    return _group(panel, panel.group) if panel.leaf is None else _node(panel, panel.leaf)


def _group(panel: InspectorState, group: Group) -> Markup:
    rows = [
        h("tr", h("th", overlay.label), h("td", overlay.at(group).text))
        for overlay in panel.overlays.values()
        if overlay.at(group).text
    ]
    ports: list[Markup] = []
    if group.parent is None:
        surgeon = panel.graph.surgeon
        tensors = [("input", t) for t in surgeon.inputs] + [("output", t) for t in surgeon.outputs]
        ports = [h("tr", h("td", side), h("td", h("code", t.name)), h("td", kind_of(t))) for side, t in tensors[:40]]
        if len(tensors) > 40:
            ports.append(h("tr", h("td", f"and {len(tensors) - 40} more")))
    folded = h("details", h("summary", "inputs and outputs"), h("table", ports), data_keep="ports") if ports else None
    return h(
        "div", h("h4", group.path or "the whole graph", f": {len(group.leaves):,} nodes"), h("table", rows), folded
    )


def _node(panel: InspectorState, leaf: Leaf) -> Markup:
    node = leaf.node
    operator = f"{node.domain}::{node.op}" if node.domain else node.op
    numbers = [
        h("tr", h("th", overlay.label), h("td", overlay.at(leaf).text))
        for overlay in panel.overlays.values()
        if overlay.at(leaf).text
    ]
    attributes = [h("tr", h("th", key), h("td", attribute_text(value))) for key, value in sorted(node.attrs.items())]
    head = h("tr", *(h("th", name) for name in ("", "tensor", "type and shape", "bytes", "", "")))
    inputs = [_input(panel, leaf, i, t) for i, t in enumerate(node.inputs) if not t.is_empty()]
    outputs = [_output(panel, i, t) for i, t in enumerate(node.outputs) if not t.is_empty()]
    shown = [_histogram(label, found) for label, found in panel.histograms]
    waits = panel.looked_at is not None and not shown
    return h(
        "div",
        h("h4", operator, " ", h("code", leaf.name)),
        h("p", "Depends on constants alone: computed once, when the engine is built.", class_="soft")
        if leaf.prepares
        else None,
        h("div", h("table", numbers, attributes), class_="wide"),
        h("div", h("table", head, inputs, outputs), class_="wide"),
        h("p", "reading …", role="status") if waits else None,
        shown,
    )


def _input(panel: InspectorState, leaf: Leaf, index: int, tensor: gs.Tensor) -> Markup:
    origin: Markup | str = "input of the graph"
    look: Markup | None = None
    if isinstance(tensor, gs.Constant):
        origin = "weight" if is_weight(tensor) else "constant"
        pressed = "true" if index == panel.looked_at else "false"
        look = button("values", "look", str(index), title=f"what is in {tensor.name}", aria_pressed=pressed)
        others = [r for r in tensor.outputs if r is not leaf.node]
        origin += f", also read by {len(others)} other nodes" if others else ""
    elif tensor.inputs and (maker := panel.tree.by_id.get(id(tensor.inputs[0]))) is not None:
        origin = _link(maker)
        if quantized(tensor) is not None:
            origin = h("span", origin, " (a quantized weight)")
    return _tensor(f"in {index}", tensor, origin, look)


def _output(panel: InspectorState, index: int, tensor: gs.Tensor) -> Markup:
    readers = list({id(r): r for r in tensor.outputs}.values())
    known = [leaf for r in readers if (leaf := panel.tree.by_id.get(id(r))) is not None]
    links: list[Markup | str] = []
    for leaf in known[:_READERS]:
        links += [_link(leaf), Markup(" ")]
    if len(known) > _READERS:
        links.append(f"and {len(known) - _READERS} more")
    if id(tensor) in panel.tree.outputs:
        links.append("output of the graph")
    return _tensor(f"out {index}", tensor, h("span", links or "nobody reads it"), None)


def _tensor(slot: str, tensor: gs.Tensor, other: Markup | str, look: Markup | None) -> Markup:
    cells = (slot, h("code", tensor.name), kind_of(tensor), tensor_bytes(tensor), other, look)
    return h("tr", *(h("td", cell) for cell in cells))


def _link(leaf: Leaf) -> Markup:
    return h("span", button(leaf.name, "go", leaf.name, class_="link"), h("code", leaf.name, class_="static-only"))


def what_is_in(leaf: Leaf, index: int) -> list[tuple[str, gs.Constant, QuantizedWeight | None]]:
    """What a histogram is made of: the numbers of a constant; those of quantized weights also as what they stand for."""
    constant = leaf.node.inputs[index]
    found: list[tuple[str, gs.Constant, QuantizedWeight | None]] = []
    if leaf.node.op == "DequantizeLinear" and index == 0 and (weight := quantized(leaf.node.outputs[0])) is not None:
        found.append((f"{constant.name}, dequantized", constant, weight))
        return [*found, (f"{constant.name}, the {weight.dtype} numbers", constant, None)]
    return [(constant.name, constant, None)]


def _histogram(label: str, found: Histogram) -> Markup:
    facts = [f"{found.total:,} numbers" + (f", {found.looked_at:,} of them looked at" if found.sampled else "")]
    facts.append(f"from {found.low:.4g} to {found.high:.4g}, mean {found.mean:.3g}, standard deviation {found.std:.3g}")
    if found.zeros:
        facts.append(f"{found.zeros / max(found.looked_at, 1):.1%} are zero")
    if found.not_finite:
        facts.append(f"{found.not_finite:,} are not finite (NaN or infinite)")
    return h("figure", h("figcaption", h("b", label)), _bars(label, found), h("small", "; ".join(facts)))


def _bars(label: str, found: Histogram) -> Markup | None:
    if not found.counts.size:
        return None
    width, height, most = 420, 90, int(found.counts.max()) or 1
    step = width / found.counts.size
    bars = []
    for i, count in enumerate(found.counts.tolist()):
        tall = height * count / most
        low, high = found.edges[i], found.edges[i + 1]
        where = f"{(low + high) / 2:.0f}" if found.integers and high - low == 1 else f"{low:.4g} to {high:.4g}"
        if count:
            bars.append(
                h(
                    "rect",
                    h("title", f"{where}: {count:,}"),
                    x=round(i * step, 2),
                    y=round(height - max(tall, 0.7), 2),
                    width=round(max(step - 0.6, 0.4), 2),
                    height=round(max(tall, 0.7), 2),
                )
            )
    inner = 0.5 if found.integers else 0.0
    texts = [
        h("text", f"{found.edges[0] + inner:.4g}", x=0, y=height + 14),
        h("text", f"{found.edges[-1] - inner:.4g}", x=width, y=height + 14, text_anchor="end"),
        h("text", f"highest bar: {number_text(most)}", x=width / 2, y=height + 14, text_anchor="middle", class_="soft"),
    ]
    return h(
        "svg", bars, texts, viewBox=f"0 0 {width} {height + 20}", width=width, height=height + 20, class_="bars", role="img",
        aria_label=f"histogram of {label}",
    )  # fmt: skip
