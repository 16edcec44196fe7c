"""How fast the panels answer on a graph of a 70B model's shape: opening the inspector, each of its actions, each step of the stepper.

    python benchmarks/panels.py [--layers 80] [--browser] [--json FILE]

The graph is the plain export of a Llama with the sizes of llama-2-70b and no weights (holes in files): three layers are traced, and the
middle one is repeated. Python's share is what `Panel.act` takes, HTML included; with --browser, Chromium (through playwright)
shows the panel and clicks, and `data-latency` says how long it was from the click to the redrawn page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import onnx_graphsurgeon as gs

import llmlab as ll
from llmlab.graph.reports.fold import layer_of
from llmlab.widgets.panel import CSS, Panel
from llmlab.zoo.shapes import sizes_of, write_checkpoint

REPEAT = 5
Row = dict[str, Any]


def deep(graph: ll.Graph, layers: int) -> ll.Graph:
    """The graph of a model of three layers with the middle one repeated, so that it has `layers`."""
    surgeon = graph.copy().surgeon
    first, middle, last = ([n for n in surgeon.nodes if layer_of(n.name) == f"model.layers.{i}"] for i in range(3))
    made = {id(t): t for n in first for t in n.outputs}
    later = {id(t) for n in last for t in n.inputs}
    (entry,) = {id(t): t for n in middle for t in n.inputs if id(t) in made and id(t) not in later}.values()
    own = {id(t): t for n in middle for t in n.outputs}
    (exit_,) = {id(t): t for n in last for t in n.inputs if id(t) in own}.values()
    at = max(i for i, n in enumerate(surgeon.nodes) if n in middle) + 1
    for node in last:
        node.name = node.name.replace("model.layers.2.", f"model.layers.{layers - 1}.").replace(
            "model.layers.2/", f"model.layers.{layers - 1}/"
        )
    source, copies = exit_, []
    for number in range(2, layers - 1):
        known: dict[int, gs.Tensor] = {id(entry): source}

        def tensor(given: gs.Tensor, number: int = number, known: dict[int, gs.Tensor] = known) -> gs.Tensor:
            if id(given) in known:
                return known[id(given)]
            name = given.name.replace("layers.1.", f"layers.{number}.")
            if id(given) in own:
                known[id(given)] = gs.Variable(f"{name}@{number}", given.dtype, given.shape)
            elif isinstance(given, gs.Constant) and name != given.name:
                known[id(given)] = gs.Constant(name, given._values)
            else:
                known[id(given)] = given
            return known[id(given)]

        for node in middle:
            name = node.name.replace("model.layers.1", f"model.layers.{number}", 1)
            inputs, outputs = [[tensor(t) for t in side] for side in (node.inputs, node.outputs)]
            copies.append(gs.Node(node.op, name, dict(node.attrs), inputs, outputs, domain=node.domain))
        source = known[id(exit_)]
    for node in last:
        node.inputs = [source if t is exit_ else t for t in node.inputs]
    surgeon.nodes[at:at] = copies
    return ll.Graph(surgeon, graph.config)


def timed(what: str, action: Callable[[], Any]) -> Row:
    seconds = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    row = {"what": what, "median_ms": 1e3 * statistics.median(seconds), "worst_ms": 1e3 * max(seconds)}
    print(f"{what:<44} {row['median_ms']:>8.1f} ms  worst {row['worst_ms']:>8.1f} ms", flush=True)
    return row


def actions(panel: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """What one does with an inspector: (what, act and its arguments)."""
    product = next(n for n in panel.tree.leaves if "layers.40." in n and n.endswith("down_proj/MatMul"))
    weight = next(
        (leaf.name, i) for leaf in panel.leaves for i, t in enumerate(leaf.node.inputs)
        if isinstance(t, gs.Constant) and "layers.40.mlp.down_proj.weight" in t.name
    )  # fmt: skip
    return [
        ("unfold a layer", ("open", "model.layers.1")),
        ("unfold its attention", ("open", "model.layers.1.self_attn")),
        ("another of the alike layers", ("member", "", "model.layers.40.self_attn")),
        ("search a name", ("search", "", "down_proj")),
        ("search what is everywhere", ("search", "", "e")),
        ("go to a hit", ("go", product)),
        ("a weight's node", ("pick", weight[0])),
        ("what is in a weight of 235 M numbers", ("look", str(weight[1]))),
        ("overlay: operations", ("overlay", "", "flops")),
        ("context slider", ("context", "", 13)),
        ("overlay: precision", ("overlay", "", "precision")),
        ("overlay: bytes", ("overlay", "", "bytes")),
        ("the whole model in the picture", ("enter", "")),
    ]


def in_python(graph: ll.Graph) -> list[Row]:
    rows = [timed(f"open: {len(graph.surgeon.nodes):,} nodes", lambda: ll.inspect(graph).html())]
    panel: Any = ll.inspect(graph)
    rows += [timed(what, lambda given=given: panel.act(*given)) for what, given in actions(panel)]
    return [*rows, timed("picture for export", panel.static)]


def of_stepper() -> list[Row]:
    """tinychat's whole history."""
    graph = ll.optimize(ll.export("tinychat"))
    rows = [timed(f"stepper, open: {len(graph.history)} passes", lambda: ll.steps(graph).html())]
    panel = ll.steps(graph)
    slowest: list[float] = []
    for at in range(len(panel.reports)):
        start = time.perf_counter()
        panel.act("step", "", at + 1)
        slowest.append(time.perf_counter() - start)
    rows.append(
        {"what": "stepper, a step", "median_ms": 1e3 * statistics.median(slowest), "worst_ms": 1e3 * max(slowest)}
    )
    print(f"{rows[-1]['what']:<44} {rows[-1]['median_ms']:>8.1f} ms  worst {rows[-1]['worst_ms']:>8.1f} ms")
    return rows


def in_browser(panel: Panel, given: list[tuple[str, tuple[Any, ...]]]) -> list[Row]:
    """The same actions in Chromium: the page's own code, a message to Python and back, the redrawn regions."""
    from playwright.sync_api import sync_playwright

    source = "".join(CSS.with_name(name).read_text("utf-8") for name in ("morph.js", "panel.js"))
    script = source.replace("export default { render };", "globalThis.render = render;")
    page_html = f"<!doctype html><meta charset='utf-8'><style>{CSS.read_text()}</style><div id='here'></div>"
    bridge = """(html) => {
        let receive;
        const model = { get: () => html, on: (_, f) => (receive = f), off: () => {}, send: async (m) => {
            if (m.open) return;
            receive({ regions: JSON.parse(await globalThis.act(JSON.stringify(m))) });
            receive({ done: m.number });
        } };
        globalThis.model = model;
        globalThis.render({ model, el: document.getElementById('here') });
    }"""

    def act(message: str) -> str:
        m = json.loads(message)
        return json.dumps(panel.act(m["act"], m["key"], m["value"]))

    press = """([act, key, value]) => {
        const place = document.querySelector('#here section');
        const button = document.createElement('button');
        button.dataset.act = act; button.dataset.key = key; button.type = 'button';
        if (value === null) { place.append(button); button.click(); button.remove(); return; }
        const field = document.createElement('select');
        field.dataset.act = act; field.dataset.key = key; field.append(new Option(value, value, true, true));
        place.append(field); field.dispatchEvent(new Event('change', { bubbles: true })); field.remove();
    }"""
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.expose_function("act", act)
        page.set_content(page_html)
        page.add_script_tag(content=script, type="module")
        page.wait_for_function("globalThis.render !== undefined")
        start = time.perf_counter()
        page.evaluate(bridge, panel.html())
        page.wait_for_selector("section.llmlab")
        rows.append({"what": "browser, open", "median_ms": 1e3 * (time.perf_counter() - start)})
        for what, (name, *more) in given:
            key, value = (*more, None)[:2] if len(more) < 2 else more
            taken = []
            for _ in range(REPEAT):
                page.evaluate(press, [name, key, value if value is None else str(value)])
                page.wait_for_function("document.querySelector('#here section').dataset.waiting === '0'")
                taken.append(float(page.evaluate("document.querySelector('#here section').dataset.latency")))
            rows.append({"what": f"browser, {what}", "median_ms": statistics.median(taken), "worst_ms": max(taken)})
        browser.close()
    for row in rows:
        print(f"{row['what']:<44} {row['median_ms']:>8.1f} ms  worst {row.get('worst_ms', row['median_ms']):>8.1f} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-70b")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--browser", action="store_true", help="also in Chromium, through playwright")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    about = machine.describe()
    print(machine.summary(about))
    with tempfile.TemporaryDirectory() as work:
        sizes = sizes_of(args.shape) | {"num_hidden_layers": 3}
        graph = deep(ll.export(write_checkpoint(Path(work) / "checkpoint", sizes, "float16")), args.layers)
        assert np.prod(graph.surgeon.nodes[0].inputs[0].shape) > 0
        rows = in_python(graph)
        if args.browser:
            panel: Any = ll.inspect(graph)
            rows += in_browser(panel, actions(panel))
    rows += of_stepper()
    if args.json:
        settings = {"shape": args.shape, "layers": args.layers, "nodes": len(graph.surgeon.nodes), "repeat": REPEAT}
        command = (
            f"python benchmarks/panels.py --shape {args.shape} --layers {args.layers}{' --browser' * args.browser}"
        )
        told = {"command": command, "machine": about, "settings": settings, "results": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
