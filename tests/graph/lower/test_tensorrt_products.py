"""Piecewise lowering with products as kernels: what they compute, which there are, and weights outside the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Store
from families import FAMILIES
from test_tensorrt import Truth

import llmlab as ll
from llmlab.errors import InputError
from llmlab.graph.edit import Editor
from llmlab.graph.graph import Graph
from llmlab.graph.lower.tensorrt import lower
from llmlab.graph.lower.tensorrt_parts import Dense, Lowered, Multiply, Normalize
from llmlab.graph.store.storage import DeferredValues

WEAK: dict[str, Any] = {"dialect": 17, "weak_type": "float16"}


def products(lowered: Lowered) -> dict[str, Multiply]:
    """By the module that they compute: `0.mlp`, `lm_head`."""
    found = (part for part in lowered.parts if isinstance(part, Multiply))
    return {p.name.removeprefix("model.layers.").removesuffix("/Product"): p for p in found}


def dense(lowered: Lowered) -> list[Dense]:
    return [part for part in lowered.parts if isinstance(part, Dense)]


def both(graph: Graph) -> list[Lowered]:
    """Under weak typing and under strong typing."""
    return [lower(graph, products=True, **WEAK), lower(ll.convert(graph, "float16"), products=True)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_kernels_and_parts_compute_what_the_graph_does(store: Store, name: str) -> None:
    """An untied head; a tied one and biases; norms between the product and attention."""
    graph = store.serving(name)
    truth = Truth(graph)
    for lowered in both(graph):
        assert truth.error(lowered) < 2e-2
        assert not any(n.op == "MatMul" for part in dense(lowered) for n in part.graph.surgeon.nodes)
        made = products(lowered)
        assert set(made) == {f"{i}.{m}" for i in (0, 1) for m in ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")} | {"lm_head"}  # fmt: skip
        for layer in "01":
            qkv, gate_up, down = (made[f"{layer}.{m}"] for m in ("self_attn", "mlp", "mlp.down_proj"))
            assert (qkv.bias is not None) == (name == "qwen2") and qkv.add is None
            assert (gate_up.gate, gate_up.depth, gate_up.width) == ("silu", 64, 80)
            assert down.add is not None and made[f"{layer}.self_attn.o_proj"].add is not None
        assert lowered.tensors[made["lm_head"].out].dtype == "float32"
        narrow = {t.dtype for n, t in lowered.tensors.items() if n != "logits"}
        assert narrow == {"float16"}
        assert {w.dtype.name for n, w in lowered.weights.items() if n == qkv.weight} == {"float16"}


def spoil(change: Callable[[Multiply], Multiply]) -> Callable[[Lowered], Lowered]:
    def apply(lowered: Lowered) -> Lowered:
        parts = [change(p) if isinstance(p, Multiply) and "layers.1" in p.name else p for p in lowered.parts]
        return replace(lowered, parts=tuple(parts))

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, add=None) if p.add else p,
        lambda p: replace(p, gate="relu") if p.gate else p,
        lambda p: replace(p, bias=None) if p.bias else p,
        lambda p: replace(p, weight=p.weight.replace("layers.1", "layers.0")) if "o_proj" in p.name else p,
    ],
)
def test_what_is_lost_would_be_seen(store: Store, change: Any) -> None:
    graph = store.serving("qwen2")
    assert Truth(graph).error(spoil(change)(lower(graph, products=True, **WEAK))) > 0.02


@pytest.mark.parametrize("norm", ["input_layernorm", "self_attn.k_norm"])
def test_another_layers_weight_would_be_seen(store: Store, norm: str) -> None:
    """One is a kernel's; the other a part's, whose plan is the same for all layers."""
    graph = store.serving("qwen3")
    lowered = lower(graph, products=True, **WEAK)
    weights = dict(lowered.weights)
    first, second = (f"model.layers.{i}.{norm}.weight" for i in (0, 1))
    weights[second] = weights[first]
    assert Truth(graph).error(replace(lowered, weights=weights)) > 0.02


def test_parts_that_are_alike_are_one_plan(store: Store) -> None:
    """The embedding; norms of heads, twice; gathers of rows. Without those norms two parts are left."""
    for lowered in both(store.serving("qwen3")):
        keys = [part.key for part in dense(lowered)]
        assert len(keys) == 4 and len(set(keys)) == 3 and keys[1] == keys[2]
    for lowered in both(store.serving("llama")):
        assert len(dense(lowered)) == 2
        assert [p.name for p in lowered.parts if isinstance(p, Normalize)] == [
            *(f"model.layers.{i}.{n}_layernorm/RowNorm" for i in (0, 1) for n in ("input", "post_attention")),
            "model.norm/RowNorm",
        ]
    plain = [part.key for part in dense(lower(store.serving("llama"), **WEAK))]
    assert len(set(plain)) == len(plain) == 3


@pytest.mark.slow
def test_more_layers_need_no_more_plans(store: Store, tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path / "c", {**tiny.MODELS["qwen3"], "num_hidden_layers": 5})
    deep = ll.optimize(ll.export(tmp_path / "c"))
    for lowered, more in zip(both(store.serving("qwen3")), both(deep), strict=True):
        few, many = ({part.key for part in dense(one)} for one in (lowered, more))
        assert len(products(more)) == len(products(lowered)) + 12 and len(dense(more)) == len(dense(lowered)) + 3
        assert many == few


def test_scalars_and_types_tell_plans_apart(store: Store) -> None:
    graph = store.serving("qwen3").copy()
    norm = next(n for n in graph.surgeon.nodes if n.op == "RMSNormalization" and "layers.0.self_attn.q_norm" in n.name)
    norm.attrs["epsilon"] = 0.1
    plain, other = ({p.key for p in dense(lower(g, products=True, **WEAK))} for g in (store.serving("qwen3"), graph))
    assert len(other) == len(plain) + 1
    kept = {p.key for p in dense(both(store.serving("qwen3"))[1])}
    assert not kept & plain, "parts whose tensors have other types"


def test_a_tied_weight_is_stored_once(store: Store) -> None:
    for lowered in both(store.serving("qwen2")):
        head = products(lowered)["lm_head"].weight
        assert head in dense(lowered)[0].inputs
        assert sum(tuple(w.shape) == (tiny.VOCAB, 64) for w in lowered.weights.values()) == 1
    for lowered in both(store.serving("llama")):
        assert sum(tuple(w.shape) == (tiny.VOCAB, 64) for w in lowered.weights.values()) == 2


def test_weights_are_computed_when_they_are_written(store: Store) -> None:
    """Joined, narrowed: nothing that is large lies in memory before."""
    for lowered in both(store.serving("llama")):
        large = [w for w in lowered.weights.values() if len(w.shape) > 1]
        assert len(large) == 10 and all(isinstance(w, DeferredValues) for w in large)
        assert not any(t._values.nbytes > 64 for part in dense(lowered) for n in part.graph.surgeon.nodes
                       for t in n.inputs if hasattr(t, "_values"))  # fmt: skip


def test_sizes_that_no_kernel_takes_stay_in_a_part(store: Store) -> None:
    graph = store.serving("llama").copy()
    edit = Editor(graph)
    head = next(n for n in edit.surgeon.nodes if n.name.startswith("lm_head/MatMul"))
    narrow = edit.constant("lm_head.narrow", np.ones((64, 90), np.float32))
    head.inputs[1] = narrow
    head.outputs[0].shape = ["N", 90]
    lowered = lower(graph, products=True, **WEAK)
    assert "lm_head" not in products(lowered)
    last = dense(lowered)[-1]
    assert lowered.tensors["logits"].width == 90 and narrow.name in last.inputs
    assert any(n.op == "MatMul" for n in last.graph.surgeon.nodes)


def test_products_are_refused_where_they_cannot_be(store: Store) -> None:
    graph = store.serving("llama")
    for options in ({}, {"hosting": "plugin", "block_size": 16}):
        with pytest.raises(InputError, match="products are kernels in piecewise hosting alone"):
            lower(graph, products=True, **options)


INTEGERS: dict[str, tuple[Any, tuple[str, int, str], float]] = {
    "int8": ("int8", ("int8", 0, ""), 2e-2),
    "int8 by groups": ({"weights": {"dtype": "int8", "group": 64}, "keep": ("*.down_proj",)}, ("int8", 64, ""), 2e-2),
    "int4 by groups": ({"weights": {"dtype": "int4", "group": 64}, "keep": ("*.down_proj",)}, ("int4", 64, ""), 2e-2),
    "int4": ({"weights": {"dtype": "int4", "group": 0}, "keep": ("*.down_proj",)}, ("int4", 0, ""), 2e-2),
    "int8 by int8": ("int8_dynamic", ("int8", 0, "int8"), 0.12),  # a number may be rounded the other way
}


@pytest.mark.parametrize("name", INTEGERS)
def test_kernels_read_quantized_weights_as_they_are(store: Store, name: str) -> None:
    """Also where they are joined; a lookup reads what its table stands for."""
    recipe, expected, bound = INTEGERS[name]
    graph = store.serving("llama")
    quantized = ll.quantize(graph, recipe)
    truth, plain = Truth(quantized), Truth(graph)
    for lowered in both(quantized):
        made = products(lowered)
        assert len(made) == 9 and not any("Linear" in op for part in dense(lowered) for op in part.graph.op_counts())
        found = {
            (p.weight_dtype, p.group, p.rounded) for n, p in made.items() if "down_proj" not in n and n != "lm_head"
        }
        assert found == {expected}
        qkv = made["0.self_attn"]
        assert qkv.scale is not None and lowered.weights[qkv.scale].dtype == np.float16
        assert lowered.weights[qkv.weight].shape == (128, 32 if expected[0] == "int4" else 64)
        assert truth.error(lowered) < bound < 3 * plain.error(lowered)


def test_a_lost_scale_would_be_seen(store: Store) -> None:
    quantized = ll.quantize(store.serving("llama"), "int8")
    lowered = lower(quantized, products=True, **WEAK)
    first, second = (products(lowered)[f"{i}.self_attn.o_proj"] for i in (0, 1))
    assert first.scale is not None and second.scale is not None
    weights = {**lowered.weights, second.scale: lowered.weights[first.scale]}
    assert Truth(quantized).error(replace(lowered, weights=weights)) > 2e-2


FEATURES = {
    "gpt2": lambda made, lowered: all(p.bias for n, p in made.items() if n != "lm_head") and not any(p.gate for p in made.values()),
    "gemma2": lambda made, lowered: {p.gate for p in made.values()} == {"", "gelu_tanh"} and not any(p.add for p in made.values())
    and isinstance(lowered.parts[-1], Dense),
    "mixtral": lambda made, lowered: set(made) == {"0.self_attn", "0.self_attn.o_proj", "lm_head"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "mixtral"))])
def test_what_families_have(tmp_path: Path, name: str) -> None:
    """LayerNorm and biases; norms behind products and a softcap behind the head; experts, which stay in the parts."""
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    tiny.make_model({**FAMILIES[name].config, **layers}).save_pretrained(tmp_path)
    graph = ll.optimize(ll.export(tmp_path))
    for lowered in both(graph):
        assert Truth(graph).error(lowered) < 2e-2
        assert FEATURES[name](products(lowered), lowered)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str) -> None:
    model = tiny.make_model(FAMILIES[name].config)
    model.save_pretrained(tmp_path)
    graph = ll.optimize(ll.export(tmp_path, max_seq_len=FAMILIES[name].max_seq_len))
    truth = Truth(graph)
    for lowered in both(graph):
        assert truth.error(lowered) < 2e-2 and products(lowered)
