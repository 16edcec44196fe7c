"""Engines whose products are kernels and whose weights lie in one file, on a GPU that ONNX Runtime and NumPy play."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Store
from fake_tensorrt import fake_gpu
from host_driver import view
from safetensors.numpy import load_file, save_file
from steps import RAGGED, cached_generation, worst_error
from test_tensorrt_backend import BLOCKS, altered, build, decodes, greedy, prompt, step, steps
from tiny import VOCAB

import llmlab as ll
from llmlab.errors import EngineError, InputError
from llmlab.graph.store.tensor_file import ALIGN
from llmlab.runtime.backends.tensorrt import weights as weights_file
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.manifest import PROGRAM, TABLES, TENSORS


@pytest.fixture
def gpu() -> Iterator[SimpleNamespace]:
    with fake_gpu() as machine:
        yield machine


def folder_of(store: Store, name: str) -> Path:
    return store.once(f"{name}.products", lambda path: build(store.serving(name), path, precision="float16"))


@pytest.fixture
def folder(store: Store, gpu: SimpleNamespace) -> Path:
    return folder_of(store, "llama")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_ragged_steps_give_what_transformers_gives(store: Store, gpu: SimpleNamespace, name: str) -> None:
    """No bias; biases and a tied head; views of a product for v alone."""
    path = folder_of(store, name)
    assert len(list(path.glob("*.plan"))) == (3 if name == "qwen3" else 2)
    backend = ll.Engine.load(path).backend(max_num_seqs=12, kv_blocks=BLOCKS)
    expected = cached_generation(store.model(name), RAGGED, ll.Engine.load(path).manifest.config.vocab_size)
    for batch, wanted in [*steps(), steps()[-1]]:
        want = np.array([expected[b][t] for b, t in wanted])
        assert worst_error(backend.execute(batch), want) < 2e-2
    assert gpu.driver.replayed >= 1, "the last step again, as it was captured"
    backend.close()
    assert gpu.driver.in_use == 0


@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic"])
def test_engines_of_quantized_weights(store: Store, gpu: SimpleNamespace, tmp_path: Path, recipe: str) -> None:
    """Half the bytes, and what transformers gives but for the rounding."""
    engine = build(ll.quantize(store.serving("llama"), recipe), tmp_path / "e", precision="float16")
    whole = ll.Engine.load(folder_of(store, "llama"))
    sizes = [e.manifest.files[TENSORS]["size"] for e in (engine, whole)]
    assert sizes[0] < 0.65 * sizes[1]
    backend: Any = engine.backend(max_num_seqs=12, kv_blocks=BLOCKS)
    expected = cached_generation(store.model("llama"), RAGGED, 96)
    errors = []
    for batch, wanted in [*steps(), steps()[-1]]:
        want = np.array([expected[b][t] for b, t in wanted])
        errors.append(worst_error(backend.execute(batch), want))
    assert 1e-2 < max(errors) < 0.2
    backend.close()
    assert gpu.driver.in_use == 0


@pytest.mark.parametrize(
    ("recipe", "precision", "bound"),
    [("kv_int8_head", "float32", 1e-2), ("int8_dynamic+kv_int8", "float16", 0.2)],  # in float16 other numbers round up
)
def test_engines_of_a_quantized_cache(
    store: Store, gpu: SimpleNamespace, tmp_path: Path, recipe: str, precision: str, bound: float
) -> None:
    """A byte a value, the scales among the tables, and what ONNX Runtime gives of the same graph; with smaller scales most are clipped."""
    calibration = list(np.random.default_rng(0).integers(0, VOCAB, (6, 48)))
    graph = ll.quantize(store.serving("llama"), recipe, calibration)
    engine = build(graph, tmp_path / "e", precision=precision)
    attends = [s["attend"] for s in json.loads((engine.path / PROGRAM).read_text())["steps"] if "attend" in s]
    tables = load_file(engine.path / TABLES)
    read = [a["tables"][name] for a in attends for name in ("k_scale", "v_scale")]
    assert (
        engine.manifest.kv.dtype == "int8" and {tables[name].shape for name in read} == {(2,)} and len(set(read)) == 4
    )
    oracle = ll.build(graph, tmp_path / "oracle", max_seq_len=64, accuracy_level=1).backend(max_num_seqs=1)
    sequences = [np.arange(7, 30), np.arange(40, 70)]
    expected = [oracle.execute(replace(chunk(t, 0, len(t)), block_table=np.zeros((1, 1), np.int32))) for t in sequences]
    oracle.close()

    def worst(folder: Path) -> float:
        """In chunks, so that most keys come from the pool."""
        backend: Any = ll.Engine.load(folder).backend(max_num_seqs=12, kv_blocks=BLOCKS)
        assert backend.pool.nbytes == 2 * 2 * BLOCKS * 16 * 2 * 16
        errors = []
        for n, (tokens, want) in enumerate(zip(sequences, expected, strict=True)):
            ends = [9, 19, len(tokens) - 1, len(tokens)]
            for start, end in pairwise([0, *ends]):
                errors.append(worst_error(backend.execute(chunk(tokens, start, end, 4 * n)), want[start:end]))
        backend.close()
        return max(errors)

    def shrunk(folder: Path) -> None:
        save_file({name: t / 50 if name in read else t for name, t in tables.items()}, folder / TABLES)

    assert worst(engine.path) < bound
    assert worst(altered(engine.path, tmp_path / "f", lambda program: None, shrunk)) > 1.2 * bound
    assert gpu.driver.in_use == 0


def chunk(tokens: np.ndarray, start: int, end: int, first_block: int = 0) -> StepBatch:
    """Tokens of one sequence from `start` to `end`, logits of each."""
    count = end - start
    return StepBatch(
        input_ids=tokens[start:end],
        position_ids=np.arange(start, end),
        query_start=np.array([0, count], np.int32),
        kv_len=np.array([end], np.int32),
        block_table=np.arange(first_block, first_block + 4, dtype=np.int32)[None],
        logits_index=np.arange(count),
    )


def test_layers_run_one_plan_on_weights_of_their_own(store: Store, gpu: SimpleNamespace, tmp_path: Path) -> None:
    """With one layer's norms of heads on another's weights the answers change."""
    folder, expected = folder_of(store, "qwen3"), cached_generation(store.model("qwen3"), RAGGED, 96)

    def mix_up(program: dict[str, Any]) -> None:
        plans = [s["plan"] for s in program["steps"] if "plan" in s]
        shared = [p for p in plans if sum(q["plan"] == p["plan"] for q in plans) > 1]
        assert len({tuple(p["inputs"].values()) for p in shared}) == len(shared) == 2
        own = {binding: name for binding, name in shared[1]["inputs"].items() if name.endswith("weight")}
        shared[0]["inputs"] |= own

    backend = ll.Engine.load(altered(folder, tmp_path / "e", mix_up)).backend(max_num_seqs=12, kv_blocks=BLOCKS)
    batch, wanted = steps()[2]
    want = np.array([expected[b][t] for b, t in wanted])
    for first, _ in steps()[:2]:
        backend.execute(first)
    assert worst_error(backend.execute(batch), want) > 2e-2


def test_a_profile_tells_products_from_parts(folder: Path) -> None:
    backend: Any = ll.Engine.load(folder).backend(max_num_seqs=4, kv_blocks=BLOCKS)
    found = backend.profile(4, 20, repeats=2)
    kinds = [one.kind for one in found.steps]
    layer = ["norm", "product", "attention", "product", "norm", "product", "product"]
    assert kinds[:15] == ["part", *layer, "norm", "product", "attention", "part", "product", "norm", "product"]
    assert [kinds.count(k) for k in ("part", "product", "attention", "norm")] == [2, 9, 2, 5]
    assert found.total("product") == 9 * 1.5
    assert backend.submit(prompt(2), greedy(2)).result().token_ids.shape == (2,)
    backend.close()


def test_the_weights_file_is_read_by_others_and_by_us(
    store: Store, folder: Path, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_file(folder / TENSORS)
    model = store.model("llama").state_dict()
    qkv = [model[f"model.layers.1.self_attn.{n}_proj.weight"].numpy() for n in "qkv"]
    (name,) = (n for n in found if "layers.1.self_attn/" in n)
    assert (found[name] == np.concatenate(qkv).astype(np.float16)).all()
    norm = "model.layers.1.input_layernorm.weight"
    assert found[norm].dtype == np.float32 and (found[norm] == model[norm].numpy()).all()
    monkeypatch.setattr(weights_file, "_PIECE", 1000)  # several pieces a tensor, the last a short one
    backend: Any = ll.Engine.load(folder).backend(max_num_seqs=4, kv_blocks=BLOCKS)
    addresses = backend.executor._bindings.addresses
    for name, array in found.items():
        assert addresses[name] % ALIGN == 0
        assert (view(addresses[name], array.shape, array.dtype) == array).all(), name
    backend.close()


def first_weight(**changes: Any) -> Any:
    def change(program: dict[str, Any]) -> None:
        name = next(s["multiply"]["weight"] for s in program["steps"] if "multiply" in s)
        program["weights"][name] |= changes

    return change


def out_of_a_weight(program: dict[str, Any]) -> None:
    plan = next(s["plan"] for s in program["steps"] if "plan" in s)
    plan["outputs"][next(iter(plan["outputs"]))] = next(iter(program["weights"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_weight(shape=[1, 1]), "which is not among the weights"),
        (first_weight(shape=[-128, 64]), "which is no weight"),
        (first_weight(shape="ab"), "which is no weight"),
        (first_weight(dtype="float99"), "which is no weight"),
        (first_weight(dtype="float32"), "which is not among the weights"),
        (lambda program: program["weights"].popitem(), "which is not"),
        (lambda program: program["weights"].update(more={"dtype": "float16", "shape": [4]}), "'more' is not in both"),
        (step("multiply", "weight", "no"), "reads no as float16 [128, 64], which is not among the weights"),
        (step("multiply", "bias", "model.norm.weight"), "as float16 [128], which is not among the weights"),
        (step("multiply", "scale", "model.norm.weight"), "its scale is 'model.norm.weight'"),
        (step("multiply", "weight_dtype", "int8"), "and its scale is None"),
        (step("multiply", "weight_dtype", "float99"), "no kernels for the product"),
        (step("multiply", "gate", "tanh"), "no kernels for the product"),
        (step("multiply", "depth", 48), "as float16 [128, 48], which is not among the weights"),
        (step("multiply", "depth", 1 << 30), "which are not there"),
        (step("multiply", "width", True), "is 64 by True"),
        (step("multiply", "x", {"tensor": "logits", "offset": 0}), "which hasn't 128 columns for each row of logits"),
        (step("multiply", "x", {"tensor": "nothing", "offset": 0}), "which are not there"),
        (step("multiply", "out", "logits"), "writes logits, which hasn't 128 columns"),
        (step("multiply", "add", "logits"), "adds logits, which is not 128 columns of float16"),
        (step("normalize", "weight", "no"), "reads no as [64], which is not among the weights"),
        (step("normalize", "width", 48), "which hasn't 48 columns"),
        (step("normalize", "width", 0), "is 0 by 0"),
        (step("normalize", "epsilon", "small"), "has epsilon 'small'"),
        (step("normalize", "epsilon", -1.0), "no kernel for"),
        (step("normalize", "x", {"tensor": "logits", "offset": 40}), "which are not there"),
        (step("normalize", "x", {"tensor": "logits", "offset": 8}), "columns from 8 of 96, not multiples of 16"),
        (out_of_a_weight, "which is not there"),
        (lambda program: program["steps"][0].update(multiply={}), "too many values to unpack"),
        (lambda program: program["steps"].append({"jump": {}}), "a step is 'jump', expected one of plan, attend, multiply, normalize"),
    ],
)  # fmt: skip
def test_programs_that_cannot_be_believed(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    copy = altered(folder, tmp_path / "e", change)
    with pytest.raises(EngineError) as caught:
        ll.Engine.load(copy).backend(max_num_seqs=2, kv_blocks=BLOCKS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def cut_short(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-64])


def other_type(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (cut_short, "truncated"),
        (other_type, "'model.norm.weight' is float16 [64], the program says float32 [64]: altered"),
        (lambda folder: (folder / TENSORS).unlink(), "not listed in the manifest: altered"),
        (lambda folder: (folder / TENSORS).write_bytes(b"\xff" * 64), "truncated or not safetensors"),
    ],
)
def test_weights_files_that_are_not_the_programs(folder: Path, tmp_path: Path, files: Any, message: str) -> None:
    copy = altered(folder, tmp_path / "e", lambda program: None, files)
    with pytest.raises(EngineError) as caught:
        ll.Engine.load(copy).backend(max_num_seqs=2, kv_blocks=BLOCKS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_was_cut_while_it_was_read(folder: Path, gpu: SimpleNamespace, monkeypatch: Any) -> None:
    read = weights_file.read_safetensors

    def then_cut(path: Path) -> Any:
        return {name: replace(t, offset=t.offset + 10**6) for name, t in read(path).items()}

    monkeypatch.setattr(weights_file, "read_safetensors", then_cut)
    with pytest.raises(EngineError, match=r"weights.safetensors: ends inside .*truncated, build the engine again"):
        ll.Engine.load(folder).backend(max_num_seqs=2, kv_blocks=BLOCKS)
    assert gpu.driver.in_use == 0


def test_weights_that_do_not_fit(folder: Path, gpu: SimpleNamespace) -> None:
    gpu.driver.refuse["cuMemAlloc"] = "CUDA_ERROR_OUT_OF_MEMORY"
    message = r"out of GPU memory: 0.00 GB for the weights was asked and 1.07 GB of 1.07 GB are free"
    with pytest.raises(EngineError, match=message):
        ll.Engine.load(folder).backend(max_num_seqs=2)


def test_who_computes_products(store: Store, gpu: SimpleNamespace, tmp_path: Path) -> None:
    graph = store.serving("llama")
    engine = build(graph, tmp_path / "e", precision="float16", products="tensorrt")
    assert engine.manifest.compiled is not None and engine.manifest.compiled.products == "tensorrt"
    assert TENSORS not in engine.manifest.files and len(list((tmp_path / "e").glob("*.plan"))) == 3
    with pytest.raises(InputError, match="products='kernels' is for piecewise hosting in float16 or bfloat16"):
        build(graph, tmp_path / "f", precision="float32", products="kernels")
    with pytest.raises(InputError, match="products is 'cublas'; available: None, kernels, tensorrt"):
        ll.BuildConfig(products="cublas")  # type: ignore[arg-type]


def test_decode_steps_of_fewer_sequences_are_padded(folder: Path) -> None:
    backend: Any = ll.Engine.load(folder).backend(max_num_seqs=12, kv_blocks=BLOCKS)
    backend.execute(prompt(11))
    first, again = backend.execute(decodes(11)), backend.execute(decodes(11))
    assert (first == again).all() and np.abs(backend.execute(decodes(9)) - first[:9]).max() < 1e-2
    backend.close()
