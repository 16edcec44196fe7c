"""Checkpoints: what is read, and that a damaged or hostile one is refused in one line."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llmlab import zoo
from llmlab.checkpoint import Checkpoint, Weights, eos_ids, generation_config, read_safetensors, resolve
from llmlab.config import ModelConfig
from llmlab.errors import CheckpointError, InputError, LlmlabError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
    "eos_token_id": [2, 3],
}


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# safetensors


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_, ml_dtypes.bfloat16],
)
def test_tensors_are_maps_of_the_file(tmp_path: Path, dtype: Any) -> None:
    expected = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
        "scalar": np.array(1).astype(dtype),
        "b.weight": np.ones((5,), dtype),
    }
    save_file(expected, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "x.safetensors")
    assert set(found) == set(expected)
    for name, stored in found.items():
        array = stored.map()
        assert array.dtype == dtype and array.shape == expected[name].shape
        np.testing.assert_array_equal(array.astype(np.float64), expected[name].astype(np.float64))
    assert isinstance(found["a"].map(), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found["a"].map()[0, 0] = 1


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "unknown type": (entry(dtype="F31"), "has type 'F31', expected one of"),
    "type of the wrong kind": (entry(dtype=["F32"]), "has type ['F32'], expected one of"),
    "no type": ({"shape": [2, 2], "data_offsets": [0, 16]}, "is malformed"),
    "no shape": ({"dtype": "F32", "data_offsets": [0, 16]}, "is malformed"),
    "no offsets": ({"dtype": "F32", "shape": [2, 2]}, "is malformed"),
    "three offsets": (entry(offsets=(0, 8, 16)), "is malformed"),
    "entry is a list": ([1], "is malformed"),
    "entry is null": (None, "is malformed"),
    "shape too large": (entry(shape=(2, 3)), "can't fill bytes 0 to 16"),
    "shape too small": (entry(shape=(3,)), "can't fill bytes 0 to 16"),
    "shape overflows": (entry(shape=(1 << 32, 1 << 32, 1 << 33)), "can't fill bytes"),
    "negative size": (entry(shape=(-2, -2)), "can't fill bytes"),
    "too many axes": (entry(shape=[1] * 100 + [4]), "can't fill bytes"),
    "fraction": (entry(shape=(2.0, 2)), "can't fill bytes"),
    "boolean": (entry(shape=(True, 4)), "can't fill bytes"),
    "text": (entry(shape="22"), "can't fill bytes"),
    "negative offset": (entry(offsets=(-16, 0)), "can't fill bytes"),
    "backwards": (entry(offsets=(16, 0)), "can't fill bytes"),
    "past the end": (entry(offsets=(16, 32)), "ends at byte"),
    "boolean offset": (entry(shape=(4, 3), offsets=(False, 48)), "can't fill bytes False to 48"),
    "negative in a shape": (entry(shape=(-4,)), "can't fill bytes"),
    "a number of many digits": (entry(shape=(10**400,)), "can't fill bytes"),
    "a hole before it": (entry(shape=(3,), offsets=(4, 16)), "no tensor fills bytes"),
    "offsets of text": (entry(offsets="ab"), "can't fill bytes"),
}


@pytest.mark.parametrize(("lie", "reason"), LIES.values(), ids=LIES)
def test_headers_that_lie(tmp_path: Path, lie: Any, reason: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"w": lie}, b"\0" * 16)
    assert reason in refusal(path) and "'w'" in refusal(path)


WHOLE = {
    "overlapping": ({"v": entry(shape=(3,), offsets=(0, 12)), "w": entry(shape=(2,), offsets=(8, 16))}, "'w' overlaps"),
    "the same bytes twice": ({"v": entry(), "w": entry()}, "overlaps another tensor at byte"),
    "a hole between": (
        {"v": entry(shape=(1,), offsets=(0, 4)), "w": entry(shape=(2,), offsets=(8, 16))},
        "before 'w': altered",
    ),
    "a hole at the end": ({"w": entry(shape=(2,), offsets=(0, 8))}, "the file's last: altered"),
    "no tensors, but bytes": ({}, "the file's last: altered"),
    "a name twice": (
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "w": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}',
        "its header has 'w' twice",
    ),
    "a key twice": (
        b'{"w": {"dtype": "F32", "dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}',
        "its header has 'dtype' twice",
    ),
    "a name that is not UTF-8": (
        b'{"\xff": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        "its header is not valid JSON",
    ),
    "UTF-16": ('{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'.encode("utf-16"), "not valid JSON"),
    "an offset of many digits": (
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, ' + b"9" * 9000 + b"]}}",
        "not valid JSON",
    ),
}


@pytest.mark.parametrize(("header", "reason"), WHOLE.values(), ids=WHOLE)
def test_headers_that_do_not_describe_the_file(tmp_path: Path, header: Any, reason: str) -> None:
    assert reason in refusal(write_raw(tmp_path / "x.safetensors", header, b"\0" * 16))


def test_tensors_that_follow_each_other_in_any_order(tmp_path: Path) -> None:
    """The control: what the cases above would be, if they were right. Empty tensors may lie anywhere between."""
    entries = {
        "w": entry(shape=(2,), offsets=(8, 16)),
        "nothing": entry(shape=(0, 3), offsets=(8, 8)),
        "v": entry(shape=(2,), offsets=(0, 8)),
    }
    assert set(read_safetensors(write_raw(tmp_path / "x.safetensors", entries, b"\0" * 16))) == set(entries)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    assert "not a regular file" in refusal(tmp_path / "x.safetensors")


def test_a_name_with_a_newline_stays_one_line(tmp_path: Path) -> None:
    assert "w\\nx" in refusal(write_raw(tmp_path / "x.safetensors", {"w\nx": None}))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, 100])
def test_truncated_files(tmp_path: Path, length: int) -> None:
    save_file({"w": np.ones((4, 4), np.float32)}, tmp_path / "whole")
    path = tmp_path / "x.safetensors"
    path.write_bytes((tmp_path / "whole").read_bytes()[:length])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{" * 50_000, b"[" * 50_000])
def test_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    assert "header" in refusal(write_raw(tmp_path / "x.safetensors", header))


def test_absurd_header_lengths(tmp_path: Path) -> None:
    for length in (1 << 20, (1 << 63) + 1, (1 << 64) - 1):
        assert "truncated or not safetensors" in refusal(write_raw(tmp_path / "x.safetensors", {}, length=length))


def test_a_pickle_by_another_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"PK\x03\x04" + b"\0" * 200)
    assert "truncated or not safetensors" in refusal(path)


def whole_file() -> bytes:
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": entry(), "b.weight": entry("F16", [4], [16, 24])}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(24))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(whole_file()) - 25), st.integers(0, 255)), max_size=4),
    end=st.one_of(st.none(), st.integers(0, len(whole_file()))),
)
@example(flips=[], end=None)
def test_damaged_headers_raise_nothing_else(tmp_path: Path, flips: list[tuple[int, int]], end: int | None) -> None:
    data = bytearray(whole_file())
    for place, value in flips:
        data[place] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(data[:end]))
    try:
        tensors = read_safetensors(path)
    except CheckpointError as problem:
        assert "\n" not in str(problem)
    else:
        for stored in tensors.values():
            assert stored.map().shape == stored.shape  # what is accepted lies within the file


# folders


def make_folder(folder: Path, config: Any = CONFIG, weights: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        save_file({"w": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


def folder_refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (2, 3) and list(checkpoint.weights) == ["w"]
    assert checkpoint.assets == {"tokenizer.json": b"{}"}


def test_files_that_are_links_into_the_hub_cache(tmp_path: Path) -> None:
    """As huggingface_hub lays them out: `snapshots/REVISION/NAME` → `blobs/HASH`."""
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    make_folder(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    checkpoint = Checkpoint(snapshot)
    assert list(checkpoint.weights) == ["w"] and checkpoint.assets == {"tokenizer.json": b"{}"}


def test_missing_parts(tmp_path: Path) -> None:
    assert "config.json: can't be read (No such file or directory)" in folder_refusal(tmp_path)
    make_folder(tmp_path, weights=False)
    assert "no model.safetensors and no model.safetensors.index.json there" in folder_refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, weights=False)
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    assert f"only {name} there, a pickle: save it as safetensors" in folder_refusal(tmp_path)


@pytest.mark.parametrize("field", [f for f in CONFIG if f != "eos_token_id"])
def test_a_config_without_a_field(tmp_path: Path, field: str) -> None:
    message = folder_refusal(make_folder(tmp_path, {k: v for k, v in CONFIG.items() if k != field}))
    name = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}.get(field, field)
    assert f"config.json: no '{name}' in it" in message
    assert ("a model without attention can't be served" in message) == (name == "num_heads")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", -3),
        ("hidden_size", "4"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 1.5),
        ("max_position_embeddings", 1 << 40),
        ("model_type", 7),
        ("eos_token_id", "2"),
        ("eos_token_id", [-1]),
    ],
)
def test_a_config_with_absurd_values(tmp_path: Path, field: str, value: Any) -> None:
    assert repr(value) in folder_refusal(make_folder(tmp_path, {**CONFIG, field: value}))


@pytest.mark.parametrize("config", [[], None, 3, "x"])
def test_a_config_that_is_no_object(tmp_path: Path, config: Any) -> None:
    assert "expected a JSON object" in folder_refusal(make_folder(tmp_path, config))


def test_names_of_older_families() -> None:
    old = {"model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = ModelConfig.from_hf(old)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.max_position_embeddings) == (4, 1, 2, 8)
    assert ModelConfig.from_hf(config.to_dict()) == config
    nested = {"model_type": "vlm", "text_config": {k: v for k, v in CONFIG.items() if k != "model_type"}}
    assert ModelConfig.from_hf(nested).vocab_size == 8


# shards


def make_shards(folder: Path, weight_map: Any) -> Path:
    make_folder(folder, weights=False)
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    weights = Weights(make_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert {n: s.shape for n, s in weights.items()} == {"a": (2,), "b": (3,)} and len(weights) == 2


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ""])
def test_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "evil.safetensors")
    message = folder_refusal(make_shards(tmp_path / "c", {"a": name}))
    assert f"names the file {name!r}, expected one inside the folder" in message


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (None, "no 'weight_map' of tensor to file in it"),
        ([1], "no 'weight_map' of tensor to file in it"),
        ({"a": 3}, "no 'weight_map' of tensor to file in it"),
        ({"a": "missing.safetensors"}, "missing.safetensors: can't be read"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "'c' is in no shard; the checkpoint is incomplete"),
    ],
)
def test_indices_that_do_not_fit(tmp_path: Path, weight_map: Any, reason: str) -> None:
    assert reason in folder_refusal(make_shards(tmp_path, weight_map))


# generation config


def test_eos_ids_of_the_generation_config_come_first() -> None:
    config = ModelConfig.from_hf(CONFIG)
    assert eos_ids(config, {}) == (2, 3)
    assert eos_ids(config, {"generation_config.json": b'{"eos_token_id": 5}'}) == (5,)
    assert generation_config({"generation_config.json": b'{"top_k": 4}'}) == {"top_k": 4}


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"eos_token_id": "x"}'])
def test_broken_generation_configs(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="generation_config") as caught:
        eos_ids(ModelConfig.from_hf(CONFIG), {"generation_config.json": data})
    assert "\n" not in str(caught.value)


# where a checkpoint is


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    assert resolve("tinychat") == zoo.path("tinychat")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../up", "", "bad name/model", "-x/y"])
def test_what_is_no_checkpoint(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "..")
    if source == "":
        with pytest.raises(LlmlabError):
            Checkpoint(resolve(source))
        return
    with pytest.raises(InputError, match="expected a checkpoint folder, a hub id"):
        resolve(source)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file, not a folder"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("LocalEntryNotFoundError", "the hub can't be reached: check the path or go online"),
        ("OfflineModeIsEnabled", "the hub can't be reached: check the path or go online"),
        ("OSError", "the hub can't be reached: check the path or go online"),
    ],
)
def test_the_hub_has_no_answer(monkeypatch: pytest.MonkeyPatch, raised: str, reason: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def download(*args: Any, **kwargs: Any) -> str:
        assert "*.bin" not in str(kwargs), "pickles are never fetched"
        raise getattr(errors, raised, OSError)("no\nway")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=reason) as caught:
        resolve("org/model")
    assert "\n" not in str(caught.value)
