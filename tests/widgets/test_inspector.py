"""The graph inspector without a browser: what is folded, found, summed up and drawn, and how much a weight is looked at."""

import importlib
import re
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from small_graphs import CONFIG

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.quantized import quantized
from llmlab.graph.store.deferred import Packed
from llmlab.graph.store.storage import array
from llmlab.widgets.inspector.flops import flops
from llmlab.widgets.inspector.hierarchy import Fold, Hierarchy
from llmlab.widgets.inspector.panel import Inspector
from llmlab.widgets.inspector.state import MOST_ROWS
from llmlab.widgets.inspector.values import histogram, pieces, sample, sample_quantized


def chain(names: list[str], width: int = 8, op: str = "MatMul") -> Graph:
    """A graph of one node after another, each with a weight of its own."""
    x = gs.Variable("input_ids", np.float32, ["T", width])
    nodes, tensor = [], x
    for index, name in enumerate(names):
        weight = gs.Constant(f"w{index}", np.full((width, width), index, np.float32))
        out = gs.Variable(f"t{index}", np.float32, ["T", width])
        nodes.append(gs.Node(op, name, {}, [tensor, weight], [out]))
        tensor = out
    surgeon = gs.Graph(nodes, inputs=[x], outputs=[tensor] if names else [])
    return Graph(surgeon, CONFIG)


def folds(graph: Graph) -> list[str]:
    root = Hierarchy(graph.surgeon, "").root
    return [f"{row.label} {len(row.members)}" if isinstance(row, Fold) else row.name for row in root.rows]


INT4 = {"weights": {"dtype": "int4", "group": 16}}
LAYERS = [f"model.layers.{i}.mlp.{part}/MatMul" for i in range(4) for part in ("up", "down")]


def test_layers_of_one_structure_stand_together():
    assert folds(chain(LAYERS)) == ["model.layers.0–3 4"]


@pytest.mark.parametrize("what", ["operator", "attribute", "shape", "type", "small constant", "connection", "nodes"])
def test_a_layer_that_differs_stands_alone(what):
    """The names are the same in all of these."""
    graph = chain(LAYERS)
    node = graph.surgeon.nodes[2]  # the first of layer 1
    if what == "operator":
        node.op = "Gemm"
    elif what == "attribute":
        node.attrs["alpha"] = 2.0
    elif what == "shape":
        node.inputs[1].values = np.zeros((8, 16), np.float32)
    elif what == "type":
        node.outputs[0].dtype = np.float16
    elif what == "small constant":
        for i, n in enumerate(graph.surgeon.nodes[::2]):
            n.inputs.append(gs.Constant(f"c{i}", np.array([1 + (i == 1)], np.int64)))
    elif what == "connection":
        graph.surgeon.nodes[3].inputs[0] = graph.surgeon.inputs[0]
    else:
        graph.surgeon.nodes.insert(3, gs.Node("Relu", "model.layers.1.mlp/Relu", {}, [node.outputs[0]], []))
    assert sorted(folds(graph)) == ["model.layers.0, 2–3 3", "model.layers.1 1"]


def test_names_alone_make_no_layers_different():
    graph = chain(LAYERS)
    graph.surgeon.nodes[2].name = "model.layers.1.mlp.other/MatMul_7"
    assert folds(graph) == ["model.layers.0–3 4"]


def test_a_graph_without_modules_is_never_flat():
    tree = Hierarchy(chain([f"MatMul_{i}" for i in range(700)]).surgeon, "")
    assert all(len(group.rows) <= 120 for group in tree.groups.values())
    assert sum(len(group.rows) for group in tree.groups.values()) > 700
    tree = Hierarchy(chain([f"m{i}/MatMul" for i in range(700)]).surgeon, "")
    assert all(len(group.rows) <= 120 for group in tree.groups.values())


@pytest.mark.parametrize(
    "names", [[], ["only/MatMul"], [""], ["MatMul"], ["a/x", "a/x", "a/x"], ["//", ".", "a./b", "#0"]]
)
def test_graphs_of_hardly_anything(names, tmp_path):
    panel = ll.inspect(chain(names))
    for leaf in list(panel.tree.leaves):
        panel.act("pick", leaf)
        assert panel.problem == "" and panel.leaf is panel.tree.leaves[leaf]
    for group in list(panel.tree.groups):
        panel.act("open", group)
    assert panel.save(tmp_path / "page.html").read_text()
    assert str(panel) and panel.to_dict()["tree"]["nodes"] == len(names)


def test_what_strangers_wrote_is_text():
    evil = "<script>alert(1)</script>\x1b[31m'\"/MatMul"
    graph = chain([evil])
    graph.surgeon.nodes[0].op = "<img src=x onerror=a()>"
    graph.surgeon.nodes[0].attrs = {"<bad>": "</td><script>"}
    graph.surgeon.nodes[0].inputs[1].name = "<svg onload=a()>"
    panel = ll.inspect(graph)
    name = next(iter(panel.tree.leaves))
    for act in (("pick", name), ("look", "1"), ("search", "", "<"), ("overlay", "", "precision")):
        panel.act(*act)
        for page in (panel.html(), panel.static()):
            assert not re.search(r"<(script|img|bad|svg on)", page) and "\x1b" not in page
    assert "&lt;svg onload" in panel.html()


@pytest.fixture(scope="module")
def serving(store) -> Graph:
    return store.serving("llama")


@pytest.fixture(scope="module")
def int4(serving) -> Graph:
    return ll.quantize(serving, INT4)


def test_sums_agree_with_the_graph(serving, int4):
    for graph in (serving, int4):
        panel = Inspector(graph)
        total = panel.overlays["bytes"]
        assert total.of(panel.leaves) == graph.weight_bytes
        rows = panel.tree.root.rows
        assert sum(total.of(row.leaves if isinstance(row, Fold) else [row]) for row in rows) == graph.weight_bytes
        for row in rows:
            if isinstance(row, Fold) and row.key.startswith("model.layers"):
                one = panel.member(row)
                parts = [r for r in one.rows if isinstance(r, Fold)]
                inner = sum(total.of(r.leaves) for r in parts) + total.of(
                    [r for r in one.rows if not isinstance(r, Fold)]
                )
                assert inner == total.of(one.leaves)


def test_parameters_are_those_of_the_model(store, serving, int4):
    wanted = sum(p.numel() for p in store.model("llama").parameters())
    for graph in (serving, int4):
        panel = Inspector(graph)
        assert panel.overlays["parameters"].of(panel.leaves) == wanted


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_operations_agree_with_torch(store, name):
    """torch counts a prefill of n tokens whose attention isn't masked: n times one token at a context of n."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = store.model(name), 32
    before, model.config._attn_implementation = model.config._attn_implementation, "eager"
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    model.config._attn_implementation = before
    wanted = counter.get_total_flops() / tokens
    for graph in (store.plain(name), store.serving(name)):
        panel = Inspector(graph)
        panel.act("context", "", 5)
        assert panel.context == tokens
        found = panel.overlays["flops"].of(panel.leaves)
        assert found == pytest.approx(wanted, rel=0.01), graph.kind
        panel.act("context", "", 6)
        assert panel.overlays["flops"].of(panel.leaves) > found


def test_a_window_bounds_what_attention_costs(store):
    graph = store.serving("mistral")
    node = next(n for n in graph.surgeon.nodes if n.op == "PagedAttention")
    assert flops(node, 3) < flops(node, 6) == flops(node, 1000) == 4 * 4 * 16 * 6


def test_quantization_error_is_that_of_the_arrays(serving, int4):
    panel = Inspector(int4, reference=serving)
    panel.act("overlay", "", "error")
    panel.wait(30)
    wide = {c.name: c for n in serving.surgeon.nodes for c in n.inputs if isinstance(c, gs.Constant)}
    error = norm = 0.0
    for node in int4.surgeon.nodes:
        if node.op == "DequantizeLinear":
            weight = quantized(node.outputs[0])
            exact = array(wide[weight.values.name.removesuffix(".int4")]).astype(np.float64)
            difference = np.square(exact - weight.dequantize()).sum()
            found = panel.overlays["error"].relative([panel.tree.leaves[node.name]])
            assert found == pytest.approx(float(np.sqrt(difference / np.square(exact).sum())), rel=1e-4)
            error, norm = error + difference, norm + np.square(exact).sum()
    assert panel.overlays["error"].relative(panel.leaves) == pytest.approx(float(np.sqrt(error / norm)), rel=1e-4)
    assert "%" in panel.draw_tree()
    other = Inspector(int4, reference=chain(LAYERS))
    other.act("overlay", "", "error")
    other.wait(30)
    assert "no quantized weight has a counterpart" in other.draw_legend()


def test_precision_says_types_in_words(int4):
    panel = Inspector(int4)
    panel.act("overlay", "", "precision")
    attention = panel.find_group("model.layers.0.self_attn")
    assert "int4" in panel.overlay.shown(attention.leaves)
    assert "int4" in panel.draw_legend() and "float32" in panel.draw_legend()
    assert panel.overlay.color(attention.leaves).startswith("var(--ll-")


def test_times_sum_up_the_tree(serving):
    names = [n.name for n in serving.surgeon.nodes]
    panel = Inspector(serving, times=dict.fromkeys(names, 1e-3))
    panel.act("overlay", "", "time")
    assert panel.overlay.of(panel.leaves) == pytest.approx(1e-3 * len(names))
    assert f"{len(names)} ms" in panel.draw_tree()
    silent = Inspector(serving)
    silent.act("overlay", "", "time")
    assert "nothing is measured" in silent.draw_legend()


def test_search_finds_what_has_the_words_in_it(serving):
    panel = Inspector(serving)
    panel.act("search", "", "PAGED layers.1")
    assert [(h.kind, h.node) for h in panel.hits if h.kind == "node"] == [
        ("node", "model.layers.1.self_attn/PagedAttention")
    ]
    panel.act("search", "", "gatedactivation")
    operator, *nodes = panel.hits
    assert (operator.kind, operator.count) == ("operator", 2) and nodes[0].count == 2
    panel.act("search", "", "lm_tail.weight")
    assert "nothing is called" in panel.draw_hits()
    panel.act("search", "", "embed_tokens.weight")
    assert {h.kind for h in panel.hits} == {"weight"}
    drawn = panel.act("go", next(h.node for h in panel.hits))
    assert set(drawn) == {"tree", "picture", "details"} and "model.embed_tokens.weight" in drawn["details"]
    panel.act("search", "", "  ")
    assert panel.draw_hits() == ""


def test_a_click_unfolds_and_a_second_one_folds(serving):
    panel = Inspector(serving)
    before = len(panel.rows())
    panel.act("open", "model.layers.0")
    assert len(panel.rows()) > before and panel.group.path == "model.layers.0"
    panel.act("open", "model.layers.0")
    assert len(panel.rows()) == before
    panel.act("member", "", "model.layers.1.mlp")
    assert panel.group.path == "model.layers.1.mlp" and "down_proj/MatMul" in panel.draw_tree()
    assert "model.layers.1.mlp" in panel.draw_picture()


def test_an_open_tree_has_a_bounded_number_of_rows(store):
    panel = Inspector(store.plain("llama"))
    for path in list(panel.tree.groups):
        panel.act("enter", path)
        assert len(panel.rows()) <= MOST_ROWS
        assert (
            max(Counter(re.findall(r"<(\w+)", d)).total() for d in map(str, (panel.draw_tree(), panel.draw_picture())))
            < 2500
        )


def test_rows_and_boxes_can_be_reached_by_keyboard(serving):
    panel = Inspector(serving)
    panel.act("open", "model.layers.0")
    tree, drawing = panel.draw_tree(), panel.draw_picture()
    rows = re.findall(r'<div [^>]*role="treeitem"[^>]*>', tree)
    assert len(rows) == len(panel.rows())
    for row in rows:
        assert 'tabindex="0"' in row and "aria-level=" in row and "data-act=" in row
    assert 'aria-expanded="true"' in tree and 'aria-expanded="false"' in tree and 'data-walk="column"' in tree
    boxes = re.findall(r"<g [^>]*data-act[^>]*>", drawing)
    assert boxes and all('tabindex="0"' in b and 'role="button"' in b and "aria-label=" in b for b in boxes)
    for control in re.findall(r"<(?:input|select)[^>]*>", panel.draw_bar()):
        assert re.search(rf"<label>?[^<]*{re.escape(control)}", panel.draw_bar()) or "label" in panel.draw_bar()


def test_bad_input_is_one_line(serving):
    panel = Inspector(serving)
    for act in (("pick", "nowhere"), ("open", "nowhere"), ("overlay", "", "nothing"), ("look", "0")):
        assert "problem" in panel.act(*act) and panel.problem.count("\n") == 0
    with pytest.raises(InputError, match="expected a Graph"):
        ll.inspect(3)
    with pytest.raises(InputError, match="takes no batch"):
        ll.inspect(serving, batch=2)
    with pytest.raises(InputError, match="reference is a str"):
        ll.inspect(serving, reference="graph")


def test_the_picture_of_a_graph_says_what_flows(serving):
    panel = Inspector(serving)
    panel.act("open", "model.layers.0.self_attn")
    drawing = str(panel.draw_picture())
    assert "float32[T, 128] · 512 B × T" in drawing  # q, k and v of 64, 32 and 32
    assert drawing.count("<rect") - drawing.count("outside") == len(panel.group.rows)
    page = panel.static()
    assert "<details" in page and "<script" not in page and "http" not in page and "xmlns" not in page


# What is in weights


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_histogram_counts_every_number(dtype):
    values = np.random.default_rng(1).normal(size=(50, 40)).astype(dtype)
    found = histogram(sample(gs.Constant("w", values)), values.size)
    assert found.counts.sum() == values.size and not found.sampled
    assert found.mean == pytest.approx(float(values.astype(np.float64).mean()), abs=1e-5)
    assert (found.low, found.high) == (float(values.astype(np.float32).min()), float(values.astype(np.float32).max()))


def test_what_is_not_finite_is_counted_apart():
    found = histogram(np.array([1.0, np.nan, np.inf, 0.0], np.float32), 4)
    assert (found.not_finite, found.zeros, found.counts.sum()) == (2, 1, 2)
    assert histogram(np.array([np.nan]), 1).counts.size == 0
    assert histogram(np.zeros(5, np.float32), 5).counts.sum() == 5


def test_four_bit_numbers_have_a_bar_each():
    values = np.random.default_rng(2).integers(-8, 8, (1 << 11, 1 << 10)).astype(ml_dtypes.int4)
    found = histogram(sample(gs.Constant("w", Packed.of(values))), values.size)
    assert found.sampled and found.integers and found.counts.size == 16
    assert np.all(np.abs(found.counts / found.looked_at - 1 / 16) < 0.01)
    assert found.counts.tolist() == np.bincount(np.asarray(sample(gs.Constant("w", values)), np.int64) + 8).tolist()


def test_a_large_map_is_sampled_from_all_over(tmp_path: Path):
    rows = 1 << 13
    file = np.memmap(tmp_path / "w.bin", np.float16, "w+", shape=(rows, 1 << 10))
    file[:] = np.arange(rows)[:, None]
    part = sample(gs.Constant("w", np.memmap(tmp_path / "w.bin", np.float16, "r", shape=file.shape)))
    assert part.size <= 1 << 20 and part.min() == 0 and part.max() == rows - 1
    assert len(np.unique(part)) > 500


@pytest.mark.parametrize("recipe", [INT4, {"weights": {"dtype": "int8"}}, {"weights": {"dtype": "fp8"}}])
def test_quantized_weights_are_seen_as_both(serving, recipe):
    graph = ll.quantize(serving, recipe)
    panel = Inspector(graph)
    node = next(n for n in graph.surgeon.nodes if n.op == "DequantizeLinear")
    panel.act("pick", node.name)
    panel.act("look", "0")
    (_, wide), (label, integers) = panel.histograms
    weight = quantized(node.outputs[0])
    assert wide.mean == pytest.approx(float(weight.dequantize().mean(dtype=np.float64)), abs=1e-6)
    assert weight.dtype in label and integers.integers == (weight.dtype != "float8_e4m3fn")
    panel.act("look", "1")
    assert len(panel.histograms) == 1


@pytest.mark.parametrize("axis,block", [(0, 0), (1, 0), (0, 32), (1, 32), (1, -1)])
def test_rows_of_a_quantized_weight_are_those_of_the_whole(axis, block, monkeypatch):
    from llmlab.graph.quantized import QuantizedWeight

    rng = np.random.default_rng(3)
    values = rng.integers(-8, 8, (256, 64)).astype(ml_dtypes.int4)
    shape = {(0, 0): (256,), (1, 0): (64,), (0, 32): (8, 64), (1, 32): (256, 2), (1, -1): ()}[axis, block]
    scale = gs.Constant("s", np.asarray(rng.random(shape) + 0.5, np.float32))
    weight = QuantizedWeight(gs.Constant("v", Packed.of(values)), scale, None, axis, max(block, 0))
    whole, seen = weight.dequantize(), 0
    monkeypatch.setattr("llmlab.widgets.inspector.values.SAMPLE", 1 << 10)
    for part, rows in pieces(weight):
        np.testing.assert_array_equal(part.dequantize(), whole[rows])
        seen += rows.stop - rows.start
    assert seen == 256
    few = sample_quantized(weight, 1 << 10)
    assert few.size <= 1 << 12 and set(few.tolist()) <= set(whole.reshape(-1).tolist())


def test_measure_runs_the_engine_and_lays_its_times_over_the_graph(store, monkeypatch):
    measure = importlib.import_module("llmlab.evaluate.layers.measure")
    real, seen = measure.layers, []
    monkeypatch.setattr(measure, "layers", lambda *given, **options: seen.append(real(*given, **options)) or seen[-1])
    panel = Inspector(store.serving("llama"), engine=store.engine("llama"))
    assert "Measure" in panel.draw_bar()
    drawn = panel.act("measure")
    assert "measuring" in drawn["legend"] and "disabled" in drawn["bar"]
    panel.wait(120)
    (found,) = seen
    assert panel.overlay.name == "time decode" and panel.working == "" and "disabled" not in panel.draw_bar()
    for phase in ("decode", "prefill"):
        panel.act("overlay", "", f"time {phase}")
        times = {leaf.name: panel.overlay.of([leaf]) for leaf in panel.leaves}
        assert set(found.by_node(phase)) <= set(times), "every node that ran is one of the graph"
        assert sum(times.values()) == pytest.approx(sum(s.seconds[phase] for s in found.layers if s.nodes))
        for leaf in panel.leaves:
            if leaf.node.op == "PagedAttention" or "down_proj/MatMul" in leaf.name:
                assert times[leaf.name] > 0, f"{leaf.name} took no time"
        assert any(times[leaf.name] == 0 for leaf in panel.leaves), "what was folded away took none"
        assert re.search(r"[\d.]+ [µm]s", panel.draw_tree())


def test_an_engine_is_measured_when_asked(serving, monkeypatch):
    class Layers:
        phases = ("decode", "prefill")

        def by_node(self, phase: str) -> dict[str, float]:
            return {n.name: 2e-3 if phase == "decode" else 5e-3 for n in serving.surgeon.nodes} | {"unknown": 1.0}

    measure = importlib.import_module("llmlab.evaluate.layers.measure")  # `llmlab.evaluate` is a function
    monkeypatch.setattr(measure, "layers", lambda engine, stop: Layers())
    panel = Inspector(serving, engine="engine")
    assert "Measure" in panel.draw_bar() and "Measure" not in Inspector(serving).draw_bar()
    panel.act("measure")
    panel.wait(30)
    assert panel.overlay.name == "time decode" and panel.working == ""
    assert panel.overlay.of(panel.leaves) == pytest.approx(2e-3 * len(panel.leaves))
    panel.act("overlay", "", "time prefill")
    assert f"{5 * len(panel.leaves)} ms" in panel.draw_tree()

    def broken(engine, stop):
        raise InputError("engine: built by an older llmlab")

    monkeypatch.setattr(measure, "layers", broken)
    panel.act("measure")
    panel.wait(30)
    assert "older llmlab" in panel.draw_legend() and panel.problem == ""
    assert "no engine to measure" in Inspector(serving).act("measure")["problem"]
