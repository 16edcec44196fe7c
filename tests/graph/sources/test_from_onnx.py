"""Plain ONNX files from elsewhere come in, and give what the checkpoint gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import steps
import tiny
from conftest import Store
from onnx_files import write_onnx
from steps import Plan, worst_error

from llmlab import zoo
from llmlab.build import build
from llmlab.errors import GraphError, InputError, LlmlabError
from llmlab.graph.export import export
from llmlab.graph.graph import Graph
from llmlab.graph.optimize import optimize
from llmlab.graph.store.storage import constants

TOLERANCE = 1e-4
PLAN = Plan(((9, 1, 1, 1), (1, 1, 0, 1), (0, 4, 1, 1), (0, 0, 31, 31)))
KINDS: dict[str, dict[str, Any]] = {
    "opset 23": {},
    "opset 23, not optimized": {"optimize": False},
    "opset 18": {"opset": 18},
    "opset 18, not optimized": {"opset": 18, "optimize": False},
    "attention mask": {"inputs": ("input_ids", "attention_mask", "position_ids")},
    "no positions": {"inputs": ("input_ids",)},
    "weights inside": {"external": False},
}


SHORT = ("opset 18", "opset 23, not optimized", "attention mask", "weights inside")
"""Kinds in which a second layer shows nothing that it doesn't in the others."""


def source(kind: str) -> str:
    return "one layer" if kind in SHORT else "llama"


def file(store: Store, kind: str) -> Path:
    """An export of a tiny model, made once."""
    model = store.model(source(kind))
    return store.once(f"{kind}.onnx", lambda path: write_onnx(model, path / "model.onnx", **KINDS[kind])) / "model.onnx"


def engine_logits(graph: Graph, folder: Path, vocab: int) -> list[np.ndarray]:
    """Logits of every step of PLAN from an engine built of `graph`."""
    serving = optimize(graph)
    left = {n.op for n in serving.surgeon.nodes}
    assert "PagedAttention" in left and "RMSNormalization" in left
    assert "RotaryEmbedding" not in left and "Cos" not in left, "PagedAttention turns q and k itself"
    backend = build(serving, folder, max_tokens_per_step=32).backend(threads=1, max_num_seqs=8)
    batches = steps.batches(PLAN, vocab, steps.slot_tables(PLAN, [4, 1, 0, 6]), steps.all_rows)
    result = [backend.execute(batch).copy() for batch, _ in batches]
    backend.close()
    return result


def same_as_cached_generation(logits: list[np.ndarray], model: Any, vocab: int) -> float:
    expected = steps.cached_generation(model, PLAN, vocab)
    batches = steps.batches(PLAN, vocab, steps.slot_tables(PLAN, [4, 1, 0, 6]), steps.all_rows)
    wanted = [np.array([expected[b][i] for b, i in rows]) for _, rows in batches]
    return max(worst_error(f, e) for f, e in zip(logits, wanted, strict=True))


MARKS = {
    "no positions": [pytest.mark.slow],
    "weights inside": [pytest.mark.slow],
    "opset 18, not optimized": [pytest.mark.slow],
    "opset 23, not optimized": [pytest.mark.slow],
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, [])) for kind in KINDS])
def test_a_file_gives_what_its_checkpoint_gives(store: Store, tmp_path: Path, kind: str) -> None:
    graph = export(file(store, kind))
    assert graph.kind == "plain" and [t.name for t in graph.surgeon.inputs] == ["input_ids", "position_ids"]
    logits = engine_logits(graph, tmp_path / "engine", tiny.VOCAB)
    assert same_as_cached_generation(logits, store.model(source(kind)), tiny.VOCAB) < TOLERANCE
    # Another model's weights are far off: the comparison can fail.
    assert same_as_cached_generation(logits, tiny.make_model(tiny.MODELS[source(kind)], seed=1), tiny.VOCAB) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("opset", [18, 23])
def test_tinychat_from_a_file_is_tinychat(tmp_path: Path, opset: int, optimized: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo.path("tinychat")).float().eval()
    path = write_onnx(model, tmp_path / "file" / "model.onnx", opset=opset, optimize=optimized)
    vocab = model.config.vocab_size
    found = engine_logits(export(path), tmp_path / "from-file", vocab)
    expected = engine_logits(export(zoo.path("tinychat")), tmp_path / "from-checkpoint", vocab)
    assert max(worst_error(f, e) for f, e in zip(found, expected, strict=True)) < TOLERANCE
    assert same_as_cached_generation(found, model, vocab) < 1e-3


def test_weights_are_maps_of_the_files_and_nodes_know_their_modules(store: Store) -> None:
    path = file(store, "opset 23, not optimized")
    graph = export(path)
    big = {t.name: t._values for t in constants(graph.surgeon) if t._values.nbytes >= 1024}
    own = {n: a for n, a in big.items() if n.startswith("model.")}
    assert len(own) > 8 and all(isinstance(a, np.memmap) for a in own.values())
    weights = store.model("one layer").state_dict()
    name = "model.model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(own[name], weights[name.removeprefix("model.")].numpy())
    assert any(n.op == "MatMul" for n in graph.nodes("model.model.layers.0.mlp.down_proj"))


@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_narrow_graphs_compute_in_float32_on_weights_as_they_are_stored(
    store: Store, tmp_path: Path, dtype: int
) -> None:
    """The oracle is the same file, its weights rounded but kept as float32."""

    def narrow(model: onnx.ModelProto, store_as: int) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(tensor)
                rounded = values.astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
                kept = rounded.astype(onnx.helper.tensor_dtype_to_np_dtype(store_as))
                tensor.CopyFrom(onnx.numpy_helper.from_array(kept, tensor.name))
        if store_as != onnx.TensorProto.FLOAT:
            for node in model.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                        attribute.i = store_as
            model.graph.output[0].type.tensor_type.elem_type = store_as

    graphs = []
    for store_as in (dtype, onnx.TensorProto.FLOAT):
        path = tmp_path / str(store_as) / "model.onnx"
        path.parent.mkdir()
        model = onnx.load(file(store, "weights inside"))
        narrow(model, store_as)
        path.write_bytes(model.SerializeToString())
        graphs.append(export(path, config=file(store, "weights inside").parent / "config.json"))
    found, expected = (engine_logits(g, tmp_path / f"engine{i}", tiny.VOCAB) for i, g in enumerate(graphs))
    assert max(worst_error(f, e) for f, e in zip(found, expected, strict=True)) < TOLERANCE
    stored = {str(t._values.dtype) for t in constants(graphs[0].surgeon) if t._values.nbytes >= 1024}
    assert stored == {"float16" if dtype == onnx.TensorProto.FLOAT16 else "bfloat16"}


def altered(store: Store, tmp_path: Path, change: Callable[[onnx.ModelProto], Any]) -> Path:
    model = onnx.load(file(store, "weights inside"))
    change(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    store.model(source("weights inside")).config.to_json_file(tmp_path / "config.json")
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(LlmlabError) as caught:
        export(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def past(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("past_key_values.0.key", 1, ["b", 2, "p", 16]))


def fixed(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def rename_output(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == "logits":
                node.output[i] = "scores"
    model.graph.output[0].name = "scores"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (past, "has a KV cache of its own (past_key_values.0.key, …); export it without one (use_cache=False)"),
        (fixed, "input_ids has a fixed size of 1; export it with dynamic batch and sequence"),
        (rename_output, "has outputs scores; expected logits"),
        (lambda m: m.opset_import[0].__setattr__("version", 12), "opset 12"),
    ],
    ids=["a KV cache", "fixed sizes", "no logits", "an old opset"],
)
def test_files_of_another_kind_are_refused(store: Store, tmp_path: Path, change: Any, reason: str) -> None:
    assert reason in refusal(altered(store, tmp_path, change))


def test_the_config(store: Store, tmp_path: Path) -> None:
    path = altered(store, tmp_path, lambda m: None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert export(path, config=config).config == export(path).config
    assert f"{tiny.VOCAB} logits a token, the config's vocab_size is 97" in refusal(
        path, config=config | {"vocab_size": 97}
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json beside it; pass config="):
        export(path)
    with pytest.raises(GraphError, match="can't be read"):
        export(path, config=tmp_path / "nowhere.json")


def test_the_longest_sequence_is_as_asked(store: Store, tmp_path: Path) -> None:
    path = altered(store, tmp_path, lambda m: None)
    assert export(path).config.max_position_embeddings == tiny.MAX_LEN
    assert export(path, max_seq_len=16).config.max_position_embeddings == 16
    with pytest.raises(InputError, match=f"max_seq_len is 65, but the model takes sequences of up to {tiny.MAX_LEN}"):
        export(path, max_seq_len=65)


def test_what_the_file_says_of_shapes_inside_is_not_believed(store: Store, tmp_path: Path) -> None:
    def lie(model: onnx.ModelProto) -> None:
        names = [n.output[0] for n in model.graph.node]
        del model.graph.value_info[:]
        model.graph.value_info.extend(onnx.helper.make_tensor_value_info(n, 7, [3, "rows"]) for n in names[:-1])

    honest, lying = export(altered(store, tmp_path, lambda m: None)), export(altered(store, tmp_path, lie))
    shapes = [{t.name: t.shape for t in g.surgeon.tensors().values()} for g in (honest, lying)]
    assert shapes[0] == shapes[1] and ["batch", "sequence", 64] in shapes[0].values()


def test_tokenizer_files_come_along(store: Store, tmp_path: Path) -> None:
    path = altered(store, tmp_path, lambda m: None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert export(path).assets == {"generation_config.json": b'{"eos_token_id": 2}'}


def test_surgeon_constants_keep_their_names(store: Store) -> None:
    graph = export(file(store, "opset 23"))
    names = {t.name for t in graph.surgeon.tensors().values() if isinstance(t, gs.Constant)}
    assert "model.model.layers.0.input_layernorm.weight" in names
