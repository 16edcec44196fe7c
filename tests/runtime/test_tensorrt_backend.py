"""Engines for TensorRT from build to tokens, on a GPU that ONNX Runtime and NumPy play: padding, staging, captures, faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Store
from fake_tensorrt import NO_KERNELS, FakeBuilder, fake_gpu
from steps import RAGGED, all_rows, batches, cached_generation, paged_tables, some_rows, worst_error
from tiny import VOCAB

import llmlab as ll
from llmlab.errors import EngineError, GpuLostError, InputError
from llmlab.runtime.batch import BlockCopy, Pipelined, SamplingBatch, StepBatch
from llmlab.runtime.manifest import Manifest

CONFIG = ll.BuildConfig(
    precision="float32", block_size=16, max_batch=12, max_tokens_per_step=80, compute_capabilities=((9, 0),)
)
BLOCKS = 40


def build(graph: Any, path: Path, **options: Any) -> ll.Engine:
    return ll.build(graph, path, target="tensorrt", config=replace(CONFIG, **options), kernels=NO_KERNELS)


@pytest.fixture
def gpu() -> Iterator[SimpleNamespace]:
    with fake_gpu() as machine:
        yield machine


@pytest.fixture
def folder(store: Store, gpu: SimpleNamespace) -> Path:
    return store.once("llama.tensorrt", lambda path: build(store.serving("llama"), path))


@pytest.fixture
def backend(folder: Path) -> Iterator[Any]:
    backend = ll.Engine.load(folder).backend(max_num_seqs=12, kv_blocks=BLOCKS)
    yield backend
    backend.close()


def steps(rows: Any = all_rows) -> list[tuple[StepBatch, list[tuple[int, int]]]]:
    """Ragged steps over the backend's pool, tables as wide as the engine's limit."""
    table = paged_tables(RAGGED, 16, BLOCKS)
    full = np.full((len(table), 4), -1, np.int32)
    full[:, : table.shape[1]] = table[:, :4]
    return batches(RAGGED, VOCAB, full, rows)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("rows", [all_rows, some_rows])
def test_ragged_steps_give_what_transformers_gives(store: Store, gpu: SimpleNamespace, name: str, rows: Any) -> None:
    path = store.once(f"{name}.tensorrt", lambda p: build(store.serving(name), p))
    backend = ll.Engine.load(path).backend(max_num_seqs=12, kv_blocks=BLOCKS)
    expected = cached_generation(store.model(name), RAGGED, VOCAB)
    for batch, wanted in steps(rows):
        logits = backend.execute(batch)
        want = np.array([expected[b][t] for b, t in wanted]).reshape(-1, VOCAB)
        assert logits.shape == want.shape and worst_error(logits, want) < 1e-5
    assert {shape.batch for shape in backend.executor.graphs} <= {4, 8} and gpu.driver.replayed == 0
    backend.close()
    assert gpu.driver.in_use == 0


def test_half_precision_crosses_between_the_parts(store: Store, gpu: SimpleNamespace, tmp_path: Path) -> None:
    engine = build(store.serving("llama"), tmp_path / "e", precision="float16")
    assert (engine.manifest.precision, engine.manifest.kv.dtype) == ("float16", "float16")
    backend = engine.backend(max_num_seqs=12, kv_blocks=BLOCKS)
    expected = cached_generation(store.model("llama"), RAGGED, VOCAB)
    worst = [
        worst_error(backend.execute(batch), np.array([expected[b][t] for b, t in wanted])) for batch, wanted in steps()
    ]
    assert 1e-5 < max(worst) < 2e-2


def decodes(count: int, position: int = 5) -> StepBatch:
    """A decode step of `count` sequences with `position` tokens each, in a block of their own."""
    table = np.full((count, 4), -1, np.int32)
    table[:, 0] = np.arange(count)
    return StepBatch(
        input_ids=np.arange(3, 3 + count),
        position_ids=np.full(count, position, np.int64),
        query_start=np.arange(count + 1, dtype=np.int32),
        kv_len=np.full(count, position + 1, np.int32),
        block_table=table,
        logits_index=np.arange(count),
    )


def prompt(count: int, tokens: int = 6) -> StepBatch:
    """The tokens before those of `decodes`."""
    one = decodes(count)
    return replace(
        one,
        input_ids=np.tile(np.arange(tokens), count),
        position_ids=np.tile(np.arange(tokens), count),
        query_start=np.arange(count + 1, dtype=np.int32) * tokens,
        kv_len=np.full(count, tokens, np.int32),
        logits_index=np.arange(1, count + 1) * tokens - 1,
    )


def test_a_decode_step_is_padded_captured_once_and_replayed(backend: Any, gpu: SimpleNamespace) -> None:
    backend.execute(prompt(11))
    assert not backend.executor.graphs
    first = backend.execute(decodes(11))
    [shape] = backend.executor.graphs
    assert (shape.tokens, shape.batch, shape.rows, shape.decode) == (12, 12, 12, True)
    assert gpu.driver.replayed == 0
    again = backend.execute(decodes(11))
    assert gpu.driver.replayed == 1 and len(backend.executor.graphs) == 1
    assert (first == again).all() and first.shape == (11, VOCAB) and np.isfinite(first).all()
    fewer = backend.execute(decodes(9))
    assert gpu.driver.replayed == 2 and np.abs(fewer - first[:9]).max() < 1e-5
    alone = backend.execute(decodes(1))
    assert {s.batch for s in backend.executor.graphs} == {1, 12} and np.abs(alone - first[:1]).max() < 1e-5


def test_longer_contexts_are_split_more_ways(backend: Any) -> None:
    assert backend.shape(decodes(1), 1).splits == (1,)
    assert backend.executor.splits(1, 1000) == (4,) and backend.executor.splits(1, 900) == (4,)
    assert backend.executor.splits(1, 700) == (2,) and backend.executor.splits(1, 0) == (0,)
    assert backend.shape(prompt(2), 2).splits == (0,)


def test_more_rows_than_sequences_are_computed_a_batch_at_a_time(backend: Any) -> None:
    batch = replace(prompt(3), logits_index=np.arange(18))
    logits = backend.execute(batch)
    assert logits.shape == (18, VOCAB)
    for row in (0, 11, 12, 17):
        one = backend.execute(replace(batch, logits_index=np.array([row])))
        assert np.abs(one[0] - logits[row]).max() < 1e-5
    assert backend.execute(replace(batch, logits_index=np.zeros(0, np.int64))).shape == (0, VOCAB)


def test_steps_that_are_too_large_are_refused(backend: Any) -> None:
    with pytest.raises(
        InputError, match=r"a step of 13 tokens, 13 sequences and 12 rows of logits; this engine takes 80"
    ):
        backend.execute(decodes(13))


def test_copied_blocks_go_on_like_their_source(backend: Any) -> None:
    backend.execute(prompt(2))
    original = backend.execute(decodes(1))
    moved = replace(decodes(1), block_table=np.array([[30, -1, -1, -1]], np.int32))
    for tokens in (5, 16):
        backend.execute(prompt(2))
        copied = backend.execute(replace(moved, copies=(BlockCopy(0, 30, tokens),)))
        assert np.abs(copied - original).max() < 1e-6
    backend.execute(prompt(2))
    short = backend.execute(replace(moved, block_table=moved.block_table + 1, copies=(BlockCopy(0, 31, 4),)))
    assert not np.abs(short - original).max() < 1e-3, "a token too few was copied, and that must show"


def greedy(count: int, host: tuple[int, ...] = (), temperature: float = 0.0) -> SamplingBatch:
    floats = {n: np.full(count, v, np.float32) for n, v in (("top_p", 1), ("min_p", 0), ("uniform", 0.6))}
    return SamplingBatch(
        temperature=np.full(count, temperature, np.float32),
        top_k=np.zeros(count, np.int32),
        host_rows=np.array(host, np.int32),
        **floats,
    )


def test_submitted_steps_refer_to_the_tokens_of_the_one_before(backend: Any) -> None:
    assert isinstance(backend, Pipelined)
    want = backend.execute(prompt(3)).argmax(axis=1)
    follow = replace(decodes(3, 6), input_ids=want)
    second = backend.execute(follow)
    one = backend.submit(prompt(3), greedy(3))
    two = backend.submit(replace(follow, input_ids=np.array([-1, -2, -3])), greedy(3, host=(0, 2)))
    assert one.result().token_ids.tolist() == want.tolist() and one.result().logits.shape == (0, VOCAB)
    got = two.result()
    assert got.token_ids.tolist() == second.argmax(axis=1).tolist()
    assert np.abs(got.logits - second[[0, 2]]).max() < 1e-5


def test_an_interrupted_submit_leaves_nothing_half_done(
    backend: Any, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its integers are read before the next step's are written in their place."""
    want = backend.execute(prompt(3))
    with monkeypatch.context() as patch:
        patch.setattr(type(backend.executor), "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.submit(decodes(3), greedy(3))
    assert not gpu.driver._queue
    assert (backend.execute(prompt(3)) == want).all()


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_chunk_without_logits_brings_no_tokens(backend: Any) -> None:
    result = backend.submit(replace(prompt(2), logits_index=np.zeros(0, np.int64)), greedy(0)).result()
    assert result.token_ids.shape == (0,) and result.logits.shape == (0, VOCAB)


def test_the_host_gets_its_arrays_back_at_once(backend: Any) -> None:
    batch = prompt(3)
    want = backend.execute(batch).argmax(axis=1).tolist()
    pending = backend.submit(batch, greedy(3))
    for array in (batch.input_ids, batch.position_ids, batch.kv_len, batch.block_table, batch.logits_index):
        array[...] = 0
    assert pending.result().token_ids.tolist() == want


def test_a_profile_names_every_part(backend: Any) -> None:
    found = backend.profile(4, 20, repeats=2)
    assert [step.kind for step in found.steps] == ["part", "attention", "part", "attention", "part"]
    assert found.shape.batch == 4 and found.step_ms == 1.5 and found.total("attention") == 3.0
    with pytest.raises(InputError, match=r"30 sequences of 20 tokens don't fit into 40 KV blocks"):
        backend.profile(30, 20)


def test_a_lost_gpu_fails_what_is_under_way_and_all_that_follows(backend: Any, gpu: SimpleNamespace) -> None:
    pending = backend.submit(prompt(2), greedy(2))
    gpu.driver.lose()
    for _ in range(2):
        with pytest.raises(GpuLostError, match=r"the GPU failed \(CUDA_ERROR_ILLEGAL_ADDRESS"):
            pending.result()
    gpu.driver._lost = None
    for call in (lambda: backend.execute(prompt(1)), lambda: backend.submit(prompt(1), greedy(1))):
        with pytest.raises(GpuLostError, match="open the engine again in a new one"):
            call()


def test_what_tensorrt_refuses_is_one_line(backend: Any, gpu: SimpleNamespace) -> None:
    object.__setattr__(gpu.library, "refuse", True)
    with pytest.raises(EngineError, match=r" failed in a step of 12 tokens: TensorRT gave no reason"):
        backend.execute(prompt(2))
    object.__setattr__(gpu.library, "refuse", None)
    assert backend.execute(prompt(2)).shape == (2, VOCAB)


def test_generation_ends_with_one_error_when_the_gpu_is_lost(folder: Path, gpu: SimpleNamespace) -> None:
    llm = ll.LLM(str(folder), max_num_seqs=4, kv_blocks=BLOCKS)
    assert len(llm.generate([[5, 6, 7], [8]], ll.SamplingParams(max_tokens=4))) == 2
    gpu.driver.lose("CUDA_ERROR_ECC_UNCORRECTABLE")
    for _ in range(2):
        with pytest.raises(EngineError, match=r"the GPU failed \(CUDA_ERROR_ECC_UNCORRECTABLE"):
            llm.generate([[5, 6, 7], [8]], ll.SamplingParams(max_tokens=4))
    llm.close()


def test_memory_that_is_not_there(store: Store, folder: Path) -> None:
    with fake_gpu(free=1 << 16), pytest.raises(EngineError, match=r"out of GPU memory"):
        ll.Engine.load(folder).backend(max_num_seqs=4)


def test_other_machines_are_refused(folder: Path, gpu: SimpleNamespace) -> None:
    engine = ll.Engine.load(folder)
    object.__setattr__(gpu.library, "version", (10, 3, 0))
    with pytest.raises(EngineError, match=r"built by TensorRT 8.6.1, here is TensorRT 10.3.0: build the engine again"):
        engine.backend(max_num_seqs=4)
    message = r"built for compute capability 9.0, this GPU \(Fake GPU\) is 8.9"
    with fake_gpu(capability=(8, 9)), pytest.raises(EngineError, match=message):
        engine.backend(max_num_seqs=4)


def test_options_of_the_other_kind_of_engine(store: Store, folder: Path) -> None:
    with pytest.raises(InputError, match="max_num_seqs is 13, expected an integer from 1 to 12"):
        ll.Engine.load(folder).backend(max_num_seqs=13)
    with ll.LLM(folder, kv_blocks=BLOCKS) as llm:
        assert llm.core.backend.max_batch == 12, "by default as many sequences as a step holds"
    with pytest.raises(InputError, match="threads is for onnxruntime engines"):
        ll.LLM(folder, threads=2)
    with pytest.raises(InputError, match="kv_blocks is for TensorRT engines"):
        ll.LLM(store.engine("llama"), kv_blocks=3)


def test_a_plan_that_was_altered(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "e"))
    plan = copy / "part000.plan"
    data = bytearray(plan.read_bytes())
    data[-1] ^= 1
    plan.write_bytes(data)
    with pytest.raises(
        EngineError, match=r"part000.plan: its sha256 is not the manifest's: altered, build the engine again"
    ):
        ll.Engine.load(copy)


def altered(folder: Path, copy: Path, change: Any, files: Any = lambda folder: None) -> Path:
    """An engine whose program and files were changed, and signed anew, as someone who means harm would."""
    shutil.copytree(folder, copy)
    program = json.loads((copy / "program.json").read_text())
    change(program)
    (copy / "program.json").write_text(json.dumps(program))
    files(copy)
    manifest = Manifest.read(copy)
    (copy / "manifest.json").unlink()
    manifest.write(copy)
    return copy


def step(kind: str, field: str, value: Any) -> Any:
    """A change to the first step of its kind."""

    def change(program: dict[str, Any]) -> None:
        next(s[kind] for s in program["steps"] if kind in s)[field] = value

    return change


def tensor(**changes: Any) -> Any:
    return lambda program: program["tensors"]["logits"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: program.pop("steps"), "'steps'"),
        (lambda program: program["steps"].pop(0), "before anything made it"),
        (lambda program: program["steps"].pop(), "the program makes no logits"),
        (tensor(dtype="float16"), "logits are not float32"),
        (tensor(width=-4), "which is no tensor"),
        (tensor(rows="X"), "which is no tensor"),
        (step("plan", "plan", "../../etc/passwd"), "'../../etc/passwd' is no file of the engine"),
        (step("plan", "inputs", {"input_ids": "elsewhere"}), "binds elsewhere, which is not there"),
        (step("attend", "layer", 7), "uses KV pool 7 of 2"),
        (step("attend", "kv_heads", 3), "has heads"),
        (step("attend", "head_dim", 32), "has other heads than KV pool 0"),
        (step("attend", "q", {"tensor": "logits", "offset": 0}), "which are not there"),
        (step("attend", "v", {"tensor": "qkv", "offset": 1 << 20}), "which are not there"),
        (step("attend", "scale", "much"), "has scale, window and softcap"),
        (step("attend", "tables", {"cos": "no", "sin": "no"}), "reads cos from 'no', which is not there"),
        (step("attend", "tables", {"cos": "no"}), "has tables cos"),
        (step("attend", "out", "logits"), "which hasn't 4 heads of 16"),
    ],
)
def test_programs_that_cannot_be_believed(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    copy = altered(folder, tmp_path / "e", change)
    with pytest.raises(EngineError) as caught:
        ll.Engine.load(copy).backend(max_num_seqs=2, kv_blocks=BLOCKS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_interrupted_build_leaves_nothing(
    store: Store, gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeBuilder, "fail_at", 1)
    with pytest.raises(KeyboardInterrupt):
        build(store.serving("llama"), tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_builders_is_needed_to_run() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'onnx', 'onnxruntime', 'onnx_graphsurgeon'):\n"
        "    sys.modules[name] = None\n"
        "import llmlab as ll, llmlab.runtime.backends.tensorrt.open\n"
        "print(ll.LLM.__name__, ll.Engine.__name__, ll.AsyncLLM.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LLM", "Engine", "AsyncLLM"], done.stderr
