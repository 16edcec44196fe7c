"""Engine folders: whole or absent, and believed only when every byte is what was built."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Store

from llmlab.build import build
from llmlab.errors import EngineError, InputError
from llmlab.graph.store import storage
from llmlab.runtime.engine import Engine
from llmlab.runtime.manifest import MANIFEST, Manifest, digest

TOKENIZER = {"tokenizer.json": b"{}", "generation_config.json": b'{"temperature": 0.7, "eos_token_id": [2, 5]}'}


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """A copy of an engine, to be altered."""
    graph = store.serving("llama").copy()
    path = store.once("llama.assets.engine", lambda p: build(_with_assets(graph), p, max_tokens_per_step=32))
    return Path(shutil.copytree(path, tmp_path / "engine"))


def _with_assets(graph: Any) -> Any:
    graph.assets = dict(TOKENIZER)
    return graph


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it anew, as someone who means harm would."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    data["sha256"] = digest(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def refusal(folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        Engine.load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_it_opens_as_it_was_built(folder: Path) -> None:
    engine = Engine.load(folder)
    m = engine.manifest
    assert (m.target, m.precision, m.max_seq_len, m.limits.max_tokens_per_step) == ("onnxruntime", "float32", 64, 32)
    assert m.eos_token_ids == (2, 5) and m.generation["temperature"] == 0.7
    assert m.kv.layers == ((2, 16), (2, 16)) and m.kv.capacity % 1024 == 0
    assert sorted(m.files) == ["generation_config.json", "model.onnx", "origins.json", "tokenizer.json", "weights.bin"]
    assert engine.size == sum(p.stat().st_size for p in folder.iterdir()) - (folder / MANIFEST).stat().st_size
    assert "llama" in repr(engine) and "onnxruntime" in engine._repr_mimebundle_()["text/html"]
    assert json.dumps(engine.to_dict())


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json", "generation_config.json", MANIFEST])
def test_a_flipped_byte_anywhere_is_seen(folder: Path, name: str) -> None:
    """In the manifest, a byte between two fields may become another blank: then it says the same."""
    whole, said = (folder / name).read_bytes(), Manifest.read(folder)
    rng = random.Random(0)
    places = range(len(whole)) if len(whole) < 50 else sorted(rng.sample(range(len(whole)), 40))
    seen = 0
    for place in [0, *places, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= rng.randrange(1, 256)
        (folder / name).write_bytes(damaged)
        if name == MANIFEST and _blank_alone(whole, bytes(damaged)):
            assert Manifest.read(folder) == said
            continue
        assert name in refusal(folder) or "format" in refusal(folder)
        seen += 1
    assert seen >= 2
    (folder / name).write_bytes(whole)
    Engine.load(folder)


def _blank_alone(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json", MANIFEST])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "long"])
def test_a_file_of_another_size_is_seen(folder: Path, name: str, how: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if how != "missing":
        (folder / name).write_bytes({"empty": b"", "short": data[:-1], "long": data + b"x"}[how])
    if name == MANIFEST and how == "short":
        Engine.load(folder)  # the last byte is a newline
    else:
        assert name in refusal(folder)


def test_an_edited_manifest_is_seen(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"max_seq_len": 64', '"max_seq_len": 65'))
    assert "its contents are not what was built" in refusal(folder)


@pytest.mark.parametrize("version", [2, 99, None, "1", 1.5, [1], True])
def test_another_version_says_what_to_do(folder: Path, version: Any) -> None:
    rewrite(folder, lambda data: data.update(format=version, llmlab="7.0"))
    message = refusal(folder)
    assert (
        f"engine format {version!r}, made by llmlab 7.0, this llmlab reads 1: build it again, or update llmlab"
        in message
    )


def test_a_future_version_may_hold_anything_else(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 2}')
    assert "engine format 2, this llmlab reads 1" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", '"x"', "\x00"])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("kv"),
        lambda d: d.update(kv=None),
        lambda d: d["kv"].update(capacity=-1),
        lambda d: d["kv"].update(layers=[[2]]),
        lambda d: d["kv"].update(layers=[[2, 1 << 70]]),
        lambda d: d.update(limits=[1, 2]),
        lambda d: d["limits"].update(max_seq_len=True),
        lambda d: d["limits"].update(max_seq_len="64"),
        lambda d: d.update(eos_token_ids=[-1]),
        lambda d: d.update(model={}),
        lambda d: d.update(model=[1]),
        lambda d: d.update(passes=[["x", float("inf")]]),
        lambda d: d.update(files=[]),
        lambda d: d["files"].update({"model.onnx": 3}),
        lambda d: d.update(generation=5),
        lambda d: d.update(compiled=5),
        lambda d: d.update(compiled={"library": "TensorRT 8.6.1"}),
    ],
)
def test_fields_that_are_missing_or_absurd(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(folder, change)
    assert "a field is missing or malformed" in refusal(folder)


@pytest.mark.parametrize("target", ["openvino", "", "../x"])
def test_another_target(folder: Path, target: str) -> None:
    rewrite(folder, lambda d: d.update(target=target))
    assert f"built for {target!r}, this llmlab runs onnxruntime, tensorrt, tensorrt-rtx" in refusal(folder)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_target_that_it_was_not_built_for(folder: Path, target: str) -> None:
    rewrite(folder, lambda d: d.update(target=target))
    assert "doesn't say how it was compiled: altered, build the engine again" in refusal(folder)


def test_engines_from_before_there_were_other_targets_open(folder: Path) -> None:
    rewrite(folder, lambda d: d.pop("compiled"))
    assert Engine.load(folder).manifest.compiled is None


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ""])
def test_names_that_lead_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(b"secret")
    entry = {"size": 6, "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}
    rewrite(folder, lambda d: d["files"].update({name: entry}))
    assert f"names the file {name!r}, expected one inside the folder" in refusal(folder)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_a_list_without_the_compiled_parts(folder: Path, name: str) -> None:
    rewrite(folder, lambda d: d["files"].pop(name))
    assert f"lists no {name}" in refusal(folder)


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "weights.bin").rename(folder.parent / "elsewhere")
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere")
    assert "expected one inside the folder" in refusal(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_tokenizer_file_added_later_is_seen(folder: Path, name: str) -> None:
    (folder / name).write_text("{{ messages }}")
    assert f"{name}: not listed in manifest.json: added after the build, remove it" in refusal(folder)


def test_other_files_do_not_matter(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    Engine.load(folder)


def test_no_folder_and_no_engine(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no manifest.json there; expected an engine folder" in refusal(tmp_path)


# What a user of another machine has: the folder and the core install.
ELSEWHERE = """
import sys
for name in ("torch", "transformers", "onnxscript"):
    sys.modules[name] = None
import numpy as np
from llmlab.runtime.batch import StepBatch
from llmlab.runtime.engine import Engine
backend = Engine.load("moved").backend(threads=1, max_num_seqs=1)
one = np.array([0, 5], np.int32)
batch = StepBatch(np.arange(3, 8), np.arange(5), one, one[1:], one[:1, None], np.array([4]))
print(backend.execute(batch).argmax(), backend.execute(batch).sum())
"""


def test_it_moves_to_another_folder_and_runs_there(folder: Path, tmp_path: Path) -> None:
    answers = []
    for place in (tmp_path, tmp_path / "far" / "away"):
        place.mkdir(parents=True, exist_ok=True)
        folder = folder.rename(place / "moved")
        done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["weights", "manifest"])
@pytest.mark.parametrize("there", [False, True])
def test_a_build_that_is_interrupted_leaves_nothing(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], at: str, there: bool
) -> None:
    path = folder if there else folder.parent / "new"
    before = {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}
    count = 0

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if at == "manifest" or count == 3:  # the third tensor
            raise stop
        return real(*args)

    real = storage.loaded
    if at == "manifest":
        monkeypatch.setattr(Manifest, "write", fail)
    else:
        monkeypatch.setattr(storage, "loaded", fail)
    with pytest.raises(stop):
        build(store.serving("llama"), path, overwrite=True)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["engine"]


def test_an_engine_is_replaced_only_when_asked(store: Store, folder: Path) -> None:
    with pytest.raises(InputError, match="pass overwrite"):
        build(store.serving("llama"), folder, max_seq_len=32)
    assert Engine.load(folder).manifest.max_seq_len == 64
    build(store.serving("llama"), folder, max_seq_len=32, overwrite=True)
    assert Engine.load(folder).manifest.max_seq_len == 32
    assert not (folder / "tokenizer.json").exists(), "nothing of the old one is left"
