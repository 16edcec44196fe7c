"""The slot backend: what a step touches, what it leaves alone, and what it costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Store

from llmlab.errors import EngineError, InputError
from llmlab.runtime.backends import onnxruntime
from llmlab.runtime.backends.onnxruntime import OnnxRuntimeBackend
from llmlab.runtime.backends.slots import SlotPool
from llmlab.runtime.batch import BlockCopy, StepBatch
from llmlab.runtime.engine import Engine

SENTINEL = np.float32(1234.5)


@pytest.fixture(scope="module")
def engine(store: Store) -> Engine:
    return Engine.load(store.engine("llama"))


def step(work: list[tuple[int, list[int], int]], copies: tuple[BlockCopy, ...] = ()) -> StepBatch:
    """A step of (slot, tokens, tokens before them); the logits of each one's last token are wanted."""
    new = np.array([len(tokens) for _, tokens, _ in work], np.int32)
    past = np.array([p for _, _, p in work], np.int32)
    start = np.cumsum([0, *new]).astype(np.int32)
    return StepBatch(
        input_ids=np.concatenate([np.array(tokens, np.int64) for _, tokens, _ in work]),
        position_ids=np.concatenate([np.arange(p, p + len(tokens)) for _, tokens, p in work]),
        query_start=start,
        kv_len=past + new,
        block_table=np.array([[slot] for slot, _, _ in work], np.int32),
        logits_index=start[1:].astype(np.int64) - 1,
        copies=copies,
    )


def make(engine: Engine, slots: int = 6) -> OnnxRuntimeBackend:
    backend = engine.backend(threads=1, max_num_seqs=slots)
    assert isinstance(backend, OnnxRuntimeBackend)
    return backend


def test_limits(engine: Engine) -> None:
    limits = make(engine, 3).limits
    assert (limits.vocab_size, limits.max_seq_len, limits.max_tokens_per_step) == (96, 64, 32)
    assert (limits.num_blocks, limits.block_size, limits.max_blocks_per_seq) == (3, 64, 1)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_thread_counts_that_are_none(engine: Engine, threads: object) -> None:
    with pytest.raises(InputError, match=r"threads is .*, expected an integer of at least 1"):
        engine.backend(threads=threads, max_num_seqs=1)  # type: ignore[arg-type]


def test_the_thread_count_does_not_change_the_answer(engine: Engine) -> None:
    batch = step([(0, list(range(3, 20)), 0), (2, [5], 0)])
    one, two = (engine.backend(threads=n, max_num_seqs=4).execute(batch) for n in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_a_step_writes_its_own_tokens_and_nothing_else(engine: Engine) -> None:
    """Idle slots between busy ones, slots outside, tokens before; what a chunk's padding may spoil lies behind the end."""
    backend = make(engine)
    backend.execute(step([(1, [3, 4, 5], 0), (4, [6, 7], 0), (2, [8] * 9, 0)]))
    pool = backend._pool.layers
    kept = [layer.copy() for layer in pool]
    for layer, before in zip(pool, kept, strict=True):
        for slot, length in ((0, 0), (1, 3), (2, 9), (3, 0), (4, 2), (5, 0)):
            layer[:, slot, :, length:] = before[:, slot, :, length:] = SENTINEL
    backend.execute(step([(4, [9], 2), (1, [10, 11, 12, 13], 3)]))
    for layer, before in zip(pool, kept, strict=True):
        for slot in (0, 2, 3, 5):
            np.testing.assert_array_equal(
                layer[:, slot], before[:, slot], err_msg=f"slot {slot} had no part in the step"
            )
        np.testing.assert_array_equal(layer[:, 1, :, :3], before[:, 1, :, :3])
        np.testing.assert_array_equal(layer[:, 4, :, :2], before[:, 4, :, :2])
        assert (layer[:, 1, :, 3:7] != SENTINEL).all() and (layer[:, 4, :, 2:3] != SENTINEL).all()
        np.testing.assert_array_equal(layer[:, 1, :, 7:], before[:, 1, :, 7:])
        np.testing.assert_array_equal(layer[:, 4, :, 3 + 3 :], before[:, 4, :, 3 + 3 :], err_msg="beyond the padding")


def test_copies_are_done_before_the_step(engine: Engine) -> None:
    backend, prompt = make(engine), list(range(3, 15))
    alone = backend.execute(step([(0, prompt, 0)])).copy()
    backend.execute(step([(3, prompt[:10], 0)]))
    found = backend.execute(step([(5, prompt[10:], 10)], copies=(BlockCopy(3, 5, 10),)))
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
    short = backend.execute(step([(4, prompt[10:], 10)], copies=(BlockCopy(3, 4, 9),)))
    assert np.abs(short - alone).max() > 0.01, "a copy that is one token short is seen"


def test_a_released_slot_reads_as_zeros_and_its_neighbours_stay(engine: Engine) -> None:
    backend = make(engine)
    backend.execute(step([(slot, [3 + slot, 4, 5], 0) for slot in range(4)]))
    before = [layer.copy() for layer in backend._pool.layers]
    backend.release([2])
    for layer, old in zip(backend._pool.layers, before, strict=True):
        assert old[:, 2, :, :3].any() and not layer[:, 2].any()
        np.testing.assert_array_equal(layer[:, [0, 1, 3]], old[:, [0, 1, 3]])


def test_a_released_slot_serves_the_next_sequence(engine: Engine) -> None:
    backend, prompt = make(engine), [9, 8, 7, 6]
    fresh = backend.execute(step([(1, prompt, 0)])).copy()
    backend.execute(step([(0, list(range(3, 30)), 0)]))
    backend.release([0])
    np.testing.assert_allclose(backend.execute(step([(0, prompt, 0)])), fresh, rtol=1e-5, atol=1e-5)
    backend.execute(step([(0, list(range(3, 30)), 0)]))
    np.testing.assert_allclose(  # not released: what is left there must not be seen either
        backend.execute(step([(0, prompt, 0)])), fresh, rtol=1e-5, atol=1e-5
    )


def test_no_logits_wanted(engine: Engine) -> None:
    batch = step([(0, [3, 4, 5], 0)])
    batch = StepBatch(
        batch.input_ids, batch.position_ids, batch.query_start, batch.kv_len, batch.block_table, np.zeros(0, np.int64)
    )
    assert make(engine).execute(batch).shape == (0, 96)


def test_bindings_are_kept_and_few(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of slots come back: the latest are kept, the longest unused go, and the answers stay the same."""
    monkeypatch.setattr(onnxruntime, "_MOST_SPANS", 5)
    backend, rng = make(engine, 8), np.random.default_rng(0)
    expected = make(engine, 1).execute(step([(0, [3], 0)]))[0].copy()
    for _ in range(200):
        slots = rng.permutation(8)[: rng.integers(1, 9)]
        logits = backend.execute(step([(int(s), [3], 0) for s in slots]))
        np.testing.assert_allclose(logits, np.tile(expected, (len(slots), 1)), rtol=1e-4, atol=1e-4)
        assert len(backend._spans) <= 5
    kept = dict(backend._spans)
    backend.execute(step([(int(s), [3], 0) for s in slots]))
    assert dict(backend._spans) == kept


def test_an_impossible_reservation_is_one_line() -> None:
    with pytest.raises(
        EngineError, match=r"can't reserve .* lower max_num_seqs, or build with a smaller max_seq_len"
    ) as caught:
        SlotPool([(8, 128)] * 64, 1 << 20, 1 << 20)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_open_is_one_line(store: Store, tmp_path: Path) -> None:
    """Its hash is right, so it was made wrong: ONNX Runtime's words, without its traceback."""
    engine = Engine.load(store.engine("llama"))
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0b nonsense")
    with pytest.raises(EngineError, match="can't open it") as caught:
        OnnxRuntimeBackend(tmp_path, engine.manifest, threads=1, num_slots=1)
    assert "\n" not in str(caught.value)


# Reads the process's resident size around what it does; prints JSON. Argument: the engine folder.
MEMORY = """
import json, resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_onnxruntime_backend import step
from llmlab.runtime.engine import Engine

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

engine = Engine.load(sys.argv[1])
token = sum(2 * heads * dim * 4 for heads, dim in engine.manifest.kv.layers)
capacity = engine.manifest.kv.capacity
backend = engine.backend(threads=1, max_num_seqs=64)
chunk, prompt = backend.limits.max_tokens_per_step, 1024
ids = np.random.default_rng(0).integers(3, 90, prompt + 1000).tolist()
backend.execute(step([(0, ids[:chunk], 0)]))
backend.execute(step([(s, [5], 0) for s in range(64)]))
backend.release(range(64))
result = {"token": token, "pool": 64 * capacity * token, "start": resident()}

def prefill(slots):
    for slot in slots:
        for at in range(0, prompt, chunk):
            backend.execute(step([(slot, ids[at : at + chunk], at)]))

prefill(range(8))
result["eight"] = resident()
backend.release(range(4))
result["four"] = resident()
prefill(range(4))
for at in range(prompt, prompt + 50):
    backend.execute(step([(s, [ids[at]], at) for s in range(8)]))
result["before"] = resident()
for at in range(prompt + 50, prompt + 450):
    backend.execute(step([(s, [ids[at]], at) for s in range(8)]))
result["after"] = resident()
backend.release(range(64))
result["end"] = resident()
print(json.dumps(result))
"""


def test_slots_cost_what_their_tokens_cost(store: Store) -> None:
    """64 slots of 8k tokens of 8 kB each are 4.8 GB reserved; 8 sequences of 1,024 tokens take 67 MB."""
    import tiny

    from llmlab.build import build
    from llmlab.graph.export import export
    from llmlab.graph.optimize import optimize

    wide = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 128,
    }
    source = store.once(
        "wide.checkpoint", lambda p: tiny.write_checkpoint(p, {**wide, "max_position_embeddings": 8192})
    )
    path = store.once("wide.engine", lambda p: build(optimize(export(source)), p, max_seq_len=8192))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PYTHONPATH": ":".join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
            "PATH": "/usr/bin:/bin",
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokens = 8 * 1024 * found["token"]
    assert found["pool"] > 60 * tokens, "the reservation is far larger than what is used"
    slack = 6e6  # ONNX Runtime's own buffers
    assert 0.9 * tokens < found["eight"] - found["start"] < 1.1 * tokens + slack
    assert 0.4 * tokens < found["eight"] - found["four"] < 0.6 * tokens + slack, (
        "half the sequences gone, half the memory back"
    )
    grown = 8 * 400 * found["token"]
    assert found["after"] - found["before"] < 1.15 * grown + slack, "400 steps grow by their tokens alone"
    assert found["end"] - found["start"] < slack, "all of it is given back"
