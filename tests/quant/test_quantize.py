"""Quantized models: the engine's logits against the same recipe simulated in torch, and what reports say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Store
from fake_quant import fake_quantized
from static_scales import ANYTHING, static_scale
from steps import Plan, all_rows, batches, cached_generation, slot_tables, worst_error

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.graph import Graph
from llmlab.graph.store.storage import constants
from llmlab.quant.recipe import Recipe
from llmlab.quant.scheme import Activations, Weights
from llmlab.runtime.engine import Engine

PLAN = Plan(((7, 1, 1, 1), (1, 4, 0, 3), (0, 5, 1, 1)))
STATIC = 0.04
# Weights alone are computed in float32 by both; activations round to the other side where float32 differs in the last bit.
EXACT, ROUNDED = 2e-5, 2e-2
RECIPES: dict[str, tuple[Any, float]] = {
    "int8": ("int8", EXACT),
    "int8 asymmetric": ("int8_asym", EXACT),
    "int4 by 16": ("int4_rtn_g16", EXACT),
    "int4 by 16, asymmetric": ("int4_rtn_g16_asym", EXACT),
    "int3 by 16": ("int3_rtn_g16", EXACT),
    "fp8": ("fp8_weights", EXACT),
    "fp8 per tensor": ("fp8_weights_tensor", EXACT),
    "int8 dynamic": ("int8_dynamic", ROUNDED),
    "fp8 dynamic": ("fp8_dynamic", ROUNDED),
    "int8 static": ("int8_w8a8", ROUNDED),
    "fp8 static": ("fp8", ROUNDED),
    "mixed": (
        {"base": "int4_rtn_g16", "layers": {"*.k_proj": None, "down": "fp8_weights", "*.up_proj": "int8"}},
        EXACT,
    ),
    "mixed activations": (
        {"base": "int8_dynamic", "layers": {"*.v_proj": None, "*.layers.1.*.up_proj": "int8"}},
        ROUNDED,
    ),
    "the head, too": ({"base": "int8", "layers": {"head": "int4_rtn_g16"}}, EXACT),
}


@pytest.fixture(autouse=True)
def found_scales() -> Iterator[None]:
    with static_scale(STATIC):
        yield


def chosen(recipe: Recipe) -> Callable[[str], tuple[Weights | None, Activations | None]]:
    def choose(name: str) -> tuple[Weights | None, Activations | None]:
        last = name.rpartition(".")[2]
        found = (None, None) if name == "lm_head" else (recipe.weights, recipe.activations)
        for override in recipe.layers:
            names = {"down": "down_proj", "head": "lm_head"}.get(override.pattern, override.pattern)
            if names.rpartition(".")[2] == last and ("layers.1" not in names or "layers.1." in name):
                found = (override.weights, override.activations)
        return found

    return choose


def logits(engine: Engine) -> list[np.ndarray]:
    """Of each sequence of the plan, [tokens, vocab]."""
    vocab = engine.manifest.config.vocab_size
    backend = engine.backend(threads=1, max_num_seqs=len(PLAN.chunks))
    found: dict[tuple[int, int], np.ndarray] = {}
    for batch, rows in batches(PLAN, vocab, slot_tables(PLAN, range(len(PLAN.chunks))), all_rows):
        for row, values in zip(rows, backend.execute(batch), strict=True):
            found[row] = values.copy()
    return [np.stack([found[b, i] for i in range(sum(c))]) for b, c in enumerate(PLAN.chunks)]


def error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(worst_error(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", RECIPES)
def test_the_engine_computes_what_the_recipe_says(store: Store, tmp_path: Path, case: str) -> None:
    given, tolerance = RECIPES[case]
    recipe = Recipe.parse(given)
    graph = ll.quantize(store.serving("llama"), recipe, calibration=ANYTHING)
    engine = ll.build(graph, tmp_path / "engine", max_tokens_per_step=32, accuracy_level=1)
    assert engine.manifest.recipe == recipe.to_dict() == graph.recipe
    model = store.model("llama")
    scales = {name: STATIC for name, _ in model.named_modules()}
    found = logits(engine)
    expected = cached_generation(fake_quantized(model, chosen(recipe), scales), PLAN, 96)
    assert error(found, expected) < tolerance
    wide = cached_generation(model, PLAN, 96)
    assert error(found, wide) > 4 * error(found, expected), "the wide model is another"


@pytest.mark.parametrize("name", ["int4_rtn", "int8_dynamic"])
def test_tinychat(store: Store, tmp_path: Path, name: str) -> None:
    """A checkpoint in float16, tied: the embedding and the head keep the wide weight."""
    recipe = Recipe.parse(name)
    engine = ll.build(
        ll.quantize(store.serving("tinychat"), recipe), tmp_path / "engine", max_seq_len=64, accuracy_level=1
    )
    model = store.model("tinychat").float()
    found = logits(engine)
    expected = cached_generation(fake_quantized(model, chosen(recipe)), PLAN, 2048)
    assert error(found, expected) < (EXACT if recipe.activations is None else ROUNDED)
    further = 4 if recipe.activations is None else 2  # over six layers, more numbers round to the other side
    assert error(found, cached_generation(model, PLAN, 2048)) > further * error(found, expected)


def test_a_wrong_scale_is_seen(store: Store, tmp_path: Path) -> None:
    """Negative control: one scale of one weight off by a hundredth."""
    graph = ll.quantize(store.serving("llama"), "int8")
    scale = next(c for c in constants(graph.surgeon) if c.name.endswith("0.mlp.up_proj.weight.scale"))
    values = scale._values.load()
    values[3] *= 1.01
    scale._values = values
    expected = cached_generation(fake_quantized(store.model("llama"), chosen(Recipe.parse("int8"))), PLAN, 96)
    found = logits(ll.build(graph, tmp_path / "engine", max_tokens_per_step=32, accuracy_level=1))
    assert error(found, expected) > 5 * EXACT


def test_the_report(store: Store, tmp_path: Path) -> None:
    before = store.serving("llama")
    graph = ll.quantize(before, "int4_rtn_g16+fp16")
    report: Any = graph.history[-1]
    assert [r.name for r in graph.history[-2:]] == ["convert_precision", "quantize"]
    assert [p.name for p in report.wide] == ["model.embed_tokens", "lm_head"] and report.rewrites == 14
    assert {p.reason for p in report.wide} == {"keep: embedding", "keep: head"}
    down = next(p for p in report.projections if p.name == "model.layers.0.mlp.down_proj")
    assert (down.role, down.weights, down.activations) == ("down", "int4 g16 (rtn)", "")
    assert (down.bytes_before, down.bytes_after) == (64 * 80 * 2, 64 * 80 // 2 + 64 * 5 * 2)
    assert "14 of 16 projections" in str(report) and "lm_head: wide (keep: head)" in str(report)
    page = report._repr_mimebundle_()["text/html"]
    assert "model.layers.0–1.mlp.down_proj (2×)" in page and "int4 g16 (rtn)" in page
    assert "int4 g16 (rtn)" in graph.history._repr_mimebundle_()["text/html"]
    graph.save(tmp_path / "graph")
    again = Graph.load(tmp_path / "graph")
    assert json.loads(json.dumps(again.history[-1].to_dict())) == json.loads(json.dumps(report.to_dict()))
    assert again.history[-1] == report and again.recipe == graph.recipe == Recipe.parse("int4_rtn_g16+fp16").to_dict()
    assert before.recipe == {} and "DequantizeLinear" not in before.op_counts(), "the given graph is as it was"
    ll.optimize(again, passes=[])
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.q_proj is quantized already"):
        ll.quantize(again, "int8")


def test_a_saved_graph_builds_the_same_engine(store: Store, tmp_path: Path) -> None:
    graph = ll.quantize(store.serving("llama"), "int4_rtn_g16")
    graph.save(tmp_path / "graph")
    first = ll.build(graph, tmp_path / "first", max_tokens_per_step=32)
    second = ll.build(Graph.load(tmp_path / "graph"), tmp_path / "second", max_tokens_per_step=32)
    assert (first.path / "weights.bin").read_bytes() == (second.path / "weights.bin").read_bytes()
    assert error(logits(first), logits(second)) == 0


def test_half_a_byte_a_weight(store: Store, tmp_path: Path) -> None:
    """In the engine's files, too."""
    engine = ll.build(ll.quantize(store.serving("tinychat"), "int4_rtn"), tmp_path / "engine", max_seq_len=64)
    layers = 6 * (384 * (384 + 128 + 128 + 384) + 3 * 384 * 768)
    most = layers / 2 + layers / 32 * 4 + 2048 * 384 * 4 + 100_000  # numbers, float32 scales, the embedding
    padding = 4096 * 100
    assert (engine.path / "weights.bin").stat().st_size < most + padding


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("int4_rtn", "down_proj: rows of 80 numbers don't divide into groups of 32: choose group 16, or 0"),
        (
            {"base": "int8", "layers": {"*.down_prj": None}},
            r"no projection matches '\*.down_prj'; nearest: \*.down_proj",
        ),
        ({"base": "int8", "keep": ["heed"]}, "no projection matches 'heed'; nearest: head"),
        ({}, "the recipe says nothing"),
    ],
)
def test_recipes_that_do_not_fit(store: Store, recipe: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        ll.quantize(store.serving("llama"), recipe)
    assert "\n" not in str(caught.value)


def test_a_calibration_that_is_missing(store: Store) -> None:
    with pytest.raises(InputError, match="int8_w8a8: needs a calibration: pass calibration=, such as a list of texts"):
        ll.quantize(store.serving("llama"), "int8_w8a8")


def test_only_serving_graphs(store: Store) -> None:
    for graph in (store.plain("llama"), "llama"):
        with pytest.raises(InputError, match="expected a serving graph"):
            ll.quantize(graph, "int8")


def test_weights_that_are_no_numbers(store: Store, tmp_path: Path) -> None:
    graph = store.serving("llama").copy()
    weight = next(c for c in constants(graph.surgeon) if c.name == "model.layers.1.mlp.up_proj.weight")
    values = np.array(weight.values)
    values[3, 5] = np.nan
    weight.values = values
    quantized = ll.quantize(graph, "int8")
    for write in (lambda: quantized.save(tmp_path / "graph"), lambda: ll.build(quantized, tmp_path / "engine")):
        with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj: holds a NaN or an infinity"):
            write()
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_the_command_line(store: Store, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmlab import cli

    store.serving("llama")
    runner, graph = CliRunner(), str(store.folder / "llama.serving")
    done = runner.invoke(cli.app, ["quantize", graph, "int4_rtn_g16", "-o", str(tmp_path / "graph")])
    assert done.exit_code == 0, done.output
    assert "int4 g16 (rtn)" in done.stdout and "14 of 16 projections" in done.stdout.replace("\n", " ")
    (tmp_path / "mine.yaml").write_text("base: int8\nlayers: {head: int8}\n")
    given = ["quantize", graph, str(tmp_path / "mine.yaml"), "-o", str(tmp_path / "other"), "--json"]
    data = json.loads(runner.invoke(cli.app, given).stdout)
    assert [p["name"] for p in data["quantization"]["projections"] if not p["weights"]] == ["model.embed_tokens"]
    built = runner.invoke(cli.app, ["build", graph, "--quantize", "int4_rtn_g16", "-o", str(tmp_path / "engine")])
    assert built.exit_code == 0 and "int4_rtn_g16" in built.stdout, built.output
    again = ll.build(Graph.load(tmp_path / "graph"), tmp_path / "same")
    weights = [(path / "weights.bin").read_bytes() for path in (tmp_path / "engine", again.path)]
    assert weights[0] == weights[1]
    refused = runner.invoke(cli.app, ["quantize", graph, "int4_rtm", "-o", str(tmp_path / "none")])
    assert refused.exit_code == 2 and "nearest: int4_rtn" in refused.stderr and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--accuracy-level", "2"], "accuracy_level is 2, expected 1 (float32) or 4"),
        (["--prefill", "int4"], "prefill is 'int4'; available: int8"),
        (["--prefill", "int8", "--target", "tensorrt"], "accuracy_level and prefill are for ONNX Runtime"),
        (["--cache", "work"], "--calibration and --cache go with --quantize"),
        (["--quantize", "int4_awk"], "no recipe is named 'int4_awk'; nearest: int4_awq"),
    ],
)
def test_options_that_do_not_fit_are_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], reason: str
) -> None:
    from typer.testing import CliRunner

    from llmlab import cli

    monkeypatch.setattr(ll, "export", lambda *_, **__: pytest.fail("the options should have been looked at first"))
    refused = CliRunner().invoke(cli.app, ["build", "tinychat", "-o", str(tmp_path / "none"), *options])
    assert refused.exit_code == 2 and refused.stderr.startswith("llmlab: ") and reason in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
