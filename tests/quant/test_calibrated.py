"""ll.quantize with recipes that look at activations: better than rounding to nearest on tokens that no calibration saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from conftest import Store

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.quant.calibrate import logits
from llmlab.quant.calibrated import calibrate
from llmlab.quant.data import calibration_data, tokenizer_of
from llmlab.quant.projections import projections
from llmlab.quant.scheme import Weights
from llmlab.zoo.tasks import examples


def random_ids(count: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(3, 96, (count, 48)))


def with_outliers(graph: Graph) -> Graph:
    """A copy whose norms before attention and before the MLP let three channels through 25 times as large."""
    result = graph.copy()
    rng = np.random.default_rng(7)
    for node in result.surgeon.nodes:
        if node.op == "RMSNormalization" and "layers" in node.name:
            weight = np.array(node.inputs[1].values, np.float32)
            weight[rng.permutation(64)[:3]] *= 25
            node.inputs[1] = gs.Constant(f"{node.name}.planted", weight)
    return result


def divergence(reference: Graph, given: Graph, data: list[np.ndarray]) -> float:
    """Mean KL(reference ‖ given) over all tokens of the data, in nats."""

    return nats(log_probabilities(reference, data), log_probabilities(given, data))


def log_probabilities(graph: Graph, data: list[np.ndarray]) -> np.ndarray:
    rows = np.concatenate(list(logits(graph, data))).astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def nats(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def outliers(store: Store) -> Graph:
    return with_outliers(store.serving("llama"))


@pytest.mark.parametrize("dtype", ["int4", "int3"])
def test_gptq_and_awq_beat_rounding_where_there_are_outliers(outliers: Graph, dtype: str) -> None:
    seen, held_out = random_ids(64, 0), random_ids(16, 1)
    p = log_probabilities(outliers, held_out)
    lost = {
        method: nats(p, log_probabilities(ll.quantize(outliers, f"{dtype}_{method}_g16", seen), held_out))
        for method in ("rtn", "gptq", "awq")
    }
    assert lost["gptq"] < 0.85 * lost["rtn"] and lost["awq"] < 0.7 * lost["rtn"], lost


def test_smoothing_and_good_scales_make_static_activations_usable(outliers: Graph) -> None:
    seen, held_out = random_ids(64, 0), random_ids(16, 1)

    def lost(**activations: Any) -> float:
        recipe = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8", **activations}}
        return divergence(outliers, ll.quantize(outliers, recipe, seen), held_out)

    plain, smooth = lost(scale="absmax"), lost(scale="absmax", smooth=0.8)
    assert smooth < 0.5 * plain
    token = {"per": "token", "dynamic": True}
    assert lost(**token, smooth=0.8) < 0.7 * lost(**token)


def test_what_is_placed_is_what_was_found(store: Store) -> None:
    """Factors fold away, and no projection is forgotten: the graph's weights are those found, times the factors of their rows."""
    graph, seen = store.serving("llama"), random_ids(16, 0)
    names = [p.name for p in projections(graph) if p.layer is not None]
    found = calibrate(graph, {name: (Weights("int4", 16, method="awq"), None) for name in names}, seen)
    placed = {p.name: p for p in projections(ll.quantize(graph, "int4_awq_g16", seen))}
    folded = graph.copy()
    rows = found.fold(folded)
    assert {name.rpartition(".")[2] for name in rows} == {"v_proj", "up_proj"}
    np.testing.assert_allclose(
        *[np.concatenate(list(logits(g, seen[:4]))) for g in (folded, graph)], rtol=1e-4, atol=3e-4
    )
    for name, weight in found.rounded(rows).items():
        np.testing.assert_array_equal(placed[name].load(), weight.dequantize())
    assert set(found.rounded(rows)) == set(names)


def test_the_same_seed_gives_the_same_weights(store: Store, tmp_path: Path) -> None:
    graph, seen = store.serving("llama"), random_ids(16, 0)

    def weights(**options: Any) -> list[np.ndarray]:
        return [p.load() for p in projections(ll.quantize(graph, "int4_awq_g16", seen, **options))]

    first, again, cached = weights(), weights(), weights(cache=tmp_path / "cache")
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(first, again, cached, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(cached, weights(cache=tmp_path / "cache"), strict=True))


def test_options_of_the_command_line_reach_the_functions(store: Store, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmlab import cli

    store.serving("llama")
    runner, graph = CliRunner(), str(store.folder / "llama.serving")
    chats = tmp_path / "texts.jsonl"
    chats.write_text("".join(f"{ids}\n" for ids in np.random.default_rng(0).integers(3, 96, (8, 48)).tolist()))
    asked = ["--calibration", str(chats), "--cache", str(tmp_path / "kept")]
    done = runner.invoke(cli.app, ["quantize", graph, "int4_gptq_g16", *asked, "-o", str(tmp_path / "graph")])
    assert done.exit_code == 0, done.output
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*") if p.is_file()}
    engine = ["build", graph, "--quantize", "int4_gptq_g16", *asked, "-o", str(tmp_path / "engine")]
    built = runner.invoke(cli.app, [*engine, "--accuracy-level", "1", "--prefill", "int8", "--json"])
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["manifest"]["products"] == {"accuracy_level": 1, "prefill": "int8"}
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*") if p.is_file()}
    assert kept and again == kept, "what the first one found is used"
    shown = runner.invoke(cli.app, ["inspect", str(tmp_path / "engine")])
    assert "accuracy level 1, prefill in int8" in shown.stdout


def test_recipes_may_differ_inside_a_product(store: Store) -> None:
    """q by GPTQ, k wide, v to nearest, down by AWQ; what the walk doesn't know stays as it is."""
    graph, seen = store.serving("llama"), random_ids(16, 0)
    recipe = {
        "base": "int4_gptq_g16",
        "layers": {
            "*.k_proj": None,
            "*.v_proj": "int8",
            "*.down_proj": "int4_awq_g16",
            "*.1.mlp.*": "int8_smoothquant",
        },
    }
    found = ll.quantize(graph, recipe, seen)
    said = {row.name: row.weights for row in found.history[-1].projections}
    assert said["model.layers.0.self_attn.q_proj"] == "int4 g16 (gptq)"
    assert said["model.layers.0.self_attn.k_proj"] == "" and said["model.layers.1.self_attn.v_proj"].startswith("int8")
    assert divergence(graph, found, random_ids(8, 1)) < 0.2
    rounded = {p.name: p.is_quantized for p in projections(found) if p.layer is not None}
    assert {name for name, yes in rounded.items() if not yes} == {f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}


def test_half_precision_is_calibrated_in_float32(store: Store) -> None:
    graph, seen = store.serving("llama"), random_ids(16, 0)
    half = ll.quantize(graph, {"base": "int4_awq_g16", "precision": "float16"}, seen)
    wide = ll.quantize(graph, "int4_awq_g16", seen)
    kinds = {str(np.dtype(n.outputs[0].dtype)) for n in half.surgeon.nodes if n.op == "PagedAttention"}
    assert kinds == {"float16"} and not [n for n in half.surgeon.nodes if n.op == "Mul"]
    expected = {p.name: p.load() for p in projections(wide)}
    for p in projections(half):
        np.testing.assert_allclose(p.load(), expected[p.name], rtol=2e-3, atol=1e-6)
    with pytest.raises(InputError, match="calibration runs in float32, and this graph is in float16"):
        ll.quantize(ll.convert(graph, "float16"), "int4_awq_g16", seen)


def held_out_chats(graph: Graph, count: int) -> list[np.ndarray]:
    chats = [[*e.messages, {"role": "assistant", "content": e.answer}] for e in examples("held-out", count, seed=5)]
    return calibration_data(chats, tokenizer_of(graph), samples=count)


def lost_on_tinychat(graph: Graph) -> Callable[[Any], float]:
    held_out = held_out_chats(graph, 40)
    p = log_probabilities(graph, held_out)
    return lambda recipe: nats(p, log_probabilities(ll.quantize(graph, recipe), held_out))


def test_gptq_beats_rounding_on_tinychat(store: Store) -> None:
    lost = lost_on_tinychat(store.serving("tinychat"))
    assert lost("int4_gptq_g64") < 0.4 * lost("int4_rtn_g64")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4_{}_g32", "int4_{}_g64", "int3_{}_g32", "int3_{}_g64", "int4_{}_g64_asym"])
def test_gptq_and_awq_beat_rounding_on_tinychat(store: Store, precision: str) -> None:
    lost = lost_on_tinychat(store.serving("tinychat"))
    nearest = lost(precision.format("rtn"))
    assert lost(precision.format("gptq")) < 0.5 * nearest and lost(precision.format("awq")) < 0.95 * nearest


@pytest.mark.slow
def test_static_int8_on_tinychat(store: Store) -> None:
    lost = lost_on_tinychat(store.serving("tinychat"))
    assert lost("int8_smoothquant") < 0.5 * lost("int8_w8a8")
