"""One layer of a mixture of experts on ONNX Runtime, four ways: what llmlab builds, and what it replaces.

    python benchmarks/moe.py --threads 2

- gathered: the chosen experts' weights are copied for every token, then batched products (what transformers' code traces to)
- dense: every expert for every token, those not chosen counted with zero
- one by one: for each expert the rows that chose it (what llmlab falls back to)
- MoE: com.microsoft.MoE with the layer's own routing (what llmlab builds)

Milliseconds, medians; the ways take turns. All four are compared with the NumPy definition first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from llmlab.config import ModelConfig
from llmlab.graph.edit import Editor
from llmlab.graph.graph import LLMLAB_DOMAIN, OPSET, Graph
from llmlab.graph.lower import onnxruntime_moe
from llmlab.graph.lower.weights import defer_weights
from llmlab.graph.store.storage import MODEL, write_onnx
from llmlab.kernels.experts import mixture_of_experts

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
SHAPES = ((512, 1024, 8, 2), (512, 512, 32, 4))  # hidden, inner, experts, chosen
TOKENS = {"decode, batch 1": 1, "decode, batch 8": 8, "prefill 128": 128}
PLAIN = {"activation": "silu", "interleaved": 0, "transposed": 0, "alpha": 1.0, "beta": 0.0, "limit": 0.0}

Build = Callable[[Editor, gs.Node], gs.Variable]


def layer(weights: tuple[np.ndarray, ...], k: int) -> Graph:
    """x [T, hidden] → router, softmax, top-k → the experts' node → y."""
    route, gate_up, down = weights
    hidden, experts = route.shape
    x, y = gs.Variable("x", F32, ["T", hidden]), gs.Variable("y", F32, ["T", hidden])
    scores, probs = gs.Variable("scores", F32, ["T", experts]), gs.Variable("probs", F32, ["T", experts])
    top, index = gs.Variable("top", F32, ["T", k]), gs.Variable("index", I64, ["T", k])
    named = [gs.Constant(n, w) for n, w in (("route", route), ("gate_up", gate_up), ("down", down))]
    nodes = [
        gs.Node("MatMul", "m/MatMul", {}, [x, named[0]], [scores]),
        gs.Node("Softmax", "m/Softmax", {}, [scores], [probs]),
        gs.Node("TopK", "m/TopK", {}, [probs, gs.Constant("k", np.array([k]))], [top, index]),
        gs.Node("MixtureOfExperts", "m/Experts", dict(PLAIN), [x, index, top, *named[1:]], [y], domain=LLMLAB_DOMAIN),
    ]
    return Graph(gs.Graph(nodes, [x], [y], opset=OPSET), ModelConfig("layer", 1, hidden, 1, 1, 1))


def _gate(edit: Editor, both: gs.Tensor, inner: int, shape: list[Any]) -> gs.Variable:
    sizes = edit.constant("sizes", np.array([inner, inner]))
    gate, up = edit.add_many("Split", "m", [both, sizes], {"axis": -1}, [(F32, shape)] * 2)
    sigmoid = edit.add("Sigmoid", "m", [gate], dtype=F32, shape=shape)
    silu = edit.add("Mul", "m", [gate, sigmoid], dtype=F32, shape=shape)
    return edit.add("Mul", "m", [silu, up], dtype=F32, shape=shape)


def gathered(edit: Editor, node: gs.Node) -> gs.Variable:
    x, index, weight, gate_up, down = node.inputs
    (_, hidden, inner), k = down.shape, index.shape[1]

    def add(op: str, inputs: list[gs.Tensor], shape: list[Any], **attrs: Any) -> gs.Variable:
        return edit.add(op, "m", inputs, attrs, dtype=F32, shape=shape)

    first, last = edit.constant("first", np.array([1])), edit.constant("last", np.array([-1]))
    row = add("Unsqueeze", [add("Unsqueeze", [x, first], ["T", 1, hidden]), last], ["T", 1, hidden, 1])
    both = add(
        "MatMul", [add("Gather", [gate_up, index], ["T", k, 2 * inner, hidden], axis=0), row], ["T", k, 2 * inner, 1]
    )
    made = _gate(edit, add("Squeeze", [both, last], ["T", k, 2 * inner]), inner, ["T", k, inner])
    column = add("Unsqueeze", [made, last], ["T", k, inner, 1])
    out = add("MatMul", [add("Gather", [down, index], ["T", k, hidden, inner], axis=0), column], ["T", k, hidden, 1])
    counted = add(
        "Mul",
        [add("Squeeze", [out, last], ["T", k, hidden]), add("Unsqueeze", [weight, last], ["T", k, 1])],
        ["T", k, hidden],
    )
    return add("ReduceSum", [counted, first], ["T", hidden], keepdims=0)


def dense(edit: Editor, node: gs.Node) -> gs.Variable:
    x, index, weight, gate_up, down = node.inputs
    experts, hidden, inner = down.shape

    def add(op: str, inputs: list[gs.Tensor], shape: list[Any], **attrs: Any) -> gs.Variable:
        return edit.add(op, "m", inputs, attrs, dtype=F32, shape=shape)

    turned = [edit.constant("turned", np.ascontiguousarray(np.swapaxes(w.values, 1, 2))) for w in (gate_up, down)]
    made = _gate(edit, add("MatMul", [x, turned[0]], [experts, "T", 2 * inner]), inner, [experts, "T", inner])
    out = add("MatMul", [made, turned[1]], [experts, "T", hidden])
    zero = edit.add(
        "Mul",
        "m",
        [node.inputs[1].inputs[0].inputs[0], edit.constant("zero", np.zeros((), F32))],
        dtype=F32,
        shape=["T", experts],
    )
    counts = add("ScatterElements", [zero, index, weight], ["T", experts], axis=1)
    columns = add(
        "Unsqueeze",
        [add("Transpose", [counts], [experts, "T"], perm=[1, 0]), edit.constant("last", np.array([-1]))],
        [experts, "T", 1],
    )
    return add(
        "ReduceSum",
        [add("Mul", [out, columns], [experts, "T", hidden]), edit.constant("axis", np.array([0]))],
        ["T", hidden],
        keepdims=0,
    )


WAYS: dict[str, Build] = {
    "gathered": gathered,
    "dense": dense,
    "one by one": onnxruntime_moe._expert_by_expert,
    "MoE": onnxruntime_moe._one_operator,
}


def session(graph: Graph, build: Build, folder: Path, threads: int) -> ort.InferenceSession:
    edit = Editor(graph.copy())
    (node,) = (n for n in edit.surgeon.nodes if n.op == "MixtureOfExperts")
    edit.replace(node.outputs[0], build(edit, node))
    edit.surgeon.cleanup().toposort()
    defer_weights(edit.surgeon)
    edit.surgeon.toposort()
    folder.mkdir(parents=True)
    write_onnx(edit.surgeon, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng, results = np.random.default_rng(0), []
    for hidden, inner, experts, k in SHAPES:
        shapes = ((hidden, experts), (experts, 2 * inner, hidden), (experts, hidden, inner))
        weights = tuple((rng.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32) for s in shapes)
        graph = layer(weights, k)
        with tempfile.TemporaryDirectory() as folder:
            ways = {n: session(graph, b, Path(folder) / n, arguments.threads) for n, b in WAYS.items()}
            for what, tokens in TOKENS.items():
                x = rng.standard_normal((tokens, hidden)).astype(np.float32)
                check(ways, x, weights, k)
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(arguments.repeat):
                    for name, way in ways.items():
                        began = time.perf_counter()
                        way.run(None, {"x": x})
                        times[name].append(1e3 * (time.perf_counter() - began))
                row = {name: round(median(t), 3) for name, t in times.items()}
                results.append({"layer": f"{hidden} × {inner}, {experts} experts, {k} chosen", "step": what, **row})
    show(results, arguments.threads)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine.describe(), "threads": arguments.threads, "ms": results}, indent=1)
        )


def check(ways: dict[str, ort.InferenceSession], x: np.ndarray, weights: tuple[np.ndarray, ...], k: int) -> None:
    scores = x @ weights[0]
    probs = np.exp(scores - scores.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    index = np.argsort(-probs, axis=1)[:, :k]
    expected = mixture_of_experts(x, index, np.take_along_axis(probs, index, 1), *weights[1:])
    for name, way in ways.items():
        error = np.abs(way.run(None, {"x": x})[0] - expected).max() / np.abs(expected).max()
        if not error < 1e-4:
            raise RuntimeError(f"{name} is off by {error:.1e}")


def show(results: list[dict[str, Any]], threads: int) -> None:
    table = Table("layer", "step", *WAYS, title=f"ms, {threads} threads, float32")
    for row in results:
        table.add_row(row["layer"], row["step"], *(f"{row[name]:.2f}" for name in WAYS))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
