"""What users get wrong: one line on standard error, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_files
import onnx
import pytest
from conftest import Store
from typer.testing import CliRunner

from llmlab import cli
from llmlab.errors import InputError
from llmlab.graph.export import export
from llmlab.graph.store.storage import MODEL
from llmlab.runtime.manifest import digest


def refused(*arguments: str) -> str:
    """The one line that the command prints; it must exit with 2 and print nothing else."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("llmlab: ") and "Traceback" not in lines[0], result.stderr
    return lines[0]


@pytest.fixture
def checkpoint(store: Store, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be spoiled."""
    return Path(shutil.copytree(store.checkpoint("llama"), tmp_path / "in" / "checkpoint"))


@pytest.fixture
def engine(store: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.engine("llama"), tmp_path / "in" / "engine"))


def config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "evil.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../evil.safetensors"}}')


NORM = "model.norm.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights missing": (
        lambda c: (c / "model.safetensors").unlink(),
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "weights truncated": (lambda c: cut(c / "model.safetensors", 0.5), "truncated, fetch it again"),
    "weights truncated in the header": (lambda c: cut(c / "model.safetensors", 0.001), "truncated or not safetensors"),
    "weights empty": (lambda c: cut(c / "model.safetensors", 0), "truncated or not safetensors"),
    "a tensor missing": (lambda c: header(c, lambda h: h.update(other=h.pop(NORM))), f"no tensor '{NORM}' in it"),
    "a tensor of another shape": (
        lambda c: header(c, lambda h: h[NORM].update(shape=[32, 2])),
        f"'{NORM}' has shape [32, 2], the config asks for [64]",
    ),
    "a header that lies": (lambda c: header(c, lambda h: h[NORM].update(shape=[65])), "can't fill bytes"),
    "a config of another size": (lambda c: config(c, hidden_size=32), "the config asks for"),
    "config missing": (lambda c: (c / "config.json").unlink(), "config.json: can't be read"),
    "config truncated": (lambda c: cut(c / "config.json", 0.5), "config.json: not valid JSON"),
    "config without a field": (lambda c: config(c, vocab_size=None), "no 'vocab_size' in it"),
    "config with an absurd field": (lambda c: config(c, hidden_size=-4), "'hidden_size' is -4"),
    "config that transformers refuses": (lambda c: config(c, num_attention_heads=5), "llama"),
    "unknown architecture": (lambda c: config(c, model_type="lama"), "transformers can't make a 'lama' model of it"),
    "a pickle": (pickled, "only pytorch_model.bin there, a pickle"),
    "own code": (
        lambda c: config(c, auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        "brings its own code; pass trust_remote_code=True",
    ),
    "quantized": (lambda c: config(c, quantization_config={"quant_method": "gptq", "bits": 4}), "quantized with gptq"),
    "quantized oddly": (lambda c: config(c, quantization_config="gptq"), "quantized"),
    "a shard outside": (index, "names the file '../evil.safetensors', expected one inside the folder"),
    "generation config broken": (
        lambda c: (c / "generation_config.json").write_text("{"),
        "generation_config.json: not valid JSON",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints(checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    spoil(checkpoint)
    out = tmp_path / "out"
    out.mkdir()
    assert reason in refused("build", str(checkpoint), "-o", str(out / "engine"))
    assert list(out.iterdir()) == []


def test_own_code_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    """Neither without the option, nor before it was asked for."""
    (checkpoint / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    config(checkpoint, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    refused("build", str(checkpoint), "-o", str(tmp_path / "engine"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["nowhere", "./also/nowhere", "tinychta"])
def test_a_source_that_is_nothing(tmp_path: Path, source: str) -> None:
    message = refused("build", source, "-o", str(tmp_path / "engine"))
    assert repr(source) in message and "expected a checkpoint folder, a hub id" in message
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_offline(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmlab", "build", "some-org/some-model", "-o", "engine"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("llmlab: some-org/some-model: no folder of that name, and the hub can't be reached")
    assert not (tmp_path / "engine").exists()


ENGINES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights altered": (lambda e: _flip(e / "weights.bin"), "its sha256 is not the manifest's"),
    "model altered": (lambda e: _flip(e / "model.onnx"), "its sha256 is not the manifest's"),
    "weights cut": (lambda e: cut(e / "weights.bin", 0.9), "truncated or altered, build it again"),
    "model missing": (lambda e: (e / "model.onnx").unlink(), "missing; the engine is incomplete"),
    "manifest edited": (lambda e: _manifest(e, sign=False, eos_token_ids=[7]), "its contents are not what was built"),
    "manifest missing": (lambda e: (e / "manifest.json").unlink(), "no manifest.json there"),
    "of the future": (lambda e: _manifest(e, format=2), "engine format 2"),
    "for another target": (lambda e: _manifest(e, target="abacus"), "built for 'abacus'"),
    "for a GPU, it says": (lambda e: _manifest(e, target="tensorrt"), "doesn't say how it was compiled"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _manifest(folder: Path, *, sign: bool = True, **changes: Any) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data | {"sha256": digest(data)} if sign else data))


@pytest.mark.parametrize(("spoil", "reason"), ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("verb", ["run", "bench", "chat"])
def test_engines(engine: Path, spoil: Callable[[Path], Any], reason: str, verb: str) -> None:
    spoil(engine)
    assert reason in refused(verb, str(engine), *(["--ids", "3,4"] if verb == "run" else []))


def test_inspect_of_an_altered_engine(engine: Path) -> None:
    _flip(engine / "weights.bin")
    assert "its sha256 is not the manifest's" in refused("inspect", str(engine))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ids", ",".join(["3"] * 65)], "65"),
        (["--ids", ",".join(["3"] * 64)], "64"),
        (["--ids", "3,96"], "96"),
        (["--ids", "3,-1"], "-1"),
        (["--ids", "three"], "three"),
        (["--ids", ""], ""),
        (["hello"], "tokenizer"),
        (["--ids", "3", "--temperature", "-1"], "temperature"),
        (["--ids", "3", "--threads", "1", "--top-p", "7"], "top_p"),
    ],
    ids=[
        "too long",
        "no room for an answer",
        "id beyond the vocabulary",
        "negative id",
        "no id",
        "empty",
        "text without a tokenizer",
        "temperature",
        "top_p",
    ],
)
def test_prompts_and_parameters(store: Store, arguments: list[str], reason: str) -> None:
    assert reason in refused("run", str(store.engine("llama")), *arguments)


def test_nothing_is_started_for_a_prompt_that_is_too_long(store: Store) -> None:
    from llmlab.runtime.llm import LLM
    from llmlab.runtime.params import SamplingParams

    with LLM(store.engine("llama"), threads=1) as llm:
        for prompts in ([[3, 4], [3] * 65], [[3, 4], []], [[3, 4], [96]]):
            with pytest.raises(InputError) as caught:
                llm.generate(prompts, SamplingParams(max_tokens=2), progress=False)
            assert "\n" not in str(caught.value)
        good = llm.generate([[3, 4]], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)
        assert len(good[0].token_ids) == 2, "it still works afterwards"


@pytest.mark.parametrize("verb", ["optimize", "build"])
def test_graphs_of_the_wrong_kind(store: Store, tmp_path: Path, verb: str) -> None:
    out = str(tmp_path / "out")
    store.serving("llama")
    if verb == "optimize":
        assert "is a serving graph already" in refused("optimize", str(store.folder / "llama.serving"), "-o", out)
        assert "no graph.json there" in refused("optimize", str(store.checkpoint("llama")), "-o", out)
    else:
        assert "is an engine already" in refused("build", str(store.engine("llama")), "-o", out)
        assert "max_seq_len is 65" in refused(
            "build", str(store.folder / "llama.serving"), "-o", out, "--max-seq-len", "65"
        )
        assert "target is 'cuda'" in refused(
            "build", str(store.folder / "llama.serving"), "-o", out, "--target", "cuda"
        )
    assert list(tmp_path.iterdir()) == []


def _maker(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if output in n.output)


# Graphs that are broken inside a file that can be read.
GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "a cycle": (lambda m: _maker(m, "gate").input.__setitem__(0, "y"), "(a cycle, or nodes out of order)"),
    "an unknown operator": (lambda m: setattr(_maker(m, "gate"), "op_type", "Softermax"), "no operator of that name"),
    "a weight that is cut": (lambda m: setattr(m.graph.initializer[1], "raw_data", b"1234"), "truncated or altered"),
    # export runs no node; it is found out where the mask is evaluated
    "a range of steps of 0": (lambda m: setattr(_maker(m, "at1").attribute[0], "i", 0), "the mask can't be evaluated"),
}


@pytest.mark.parametrize(
    ("name", "verb"), [*((n, "build") for n in GRAPHS), *((n, "export") for n in list(GRAPHS)[:3])]
)
def test_graphs_broken_inside_an_onnx_file(tmp_path: Path, name: str, verb: str) -> None:
    spoil, reason = GRAPHS[name]
    path = broken_files.write(tmp_path, spoil)
    (tmp_path / "config.json").write_text(json.dumps(broken_files.CONFIG))
    before = sorted(tmp_path.rglob("*"))
    assert reason in refused(verb, str(path), "-o", str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["optimize", "build"])
@pytest.mark.parametrize(("spoil", "reason"), GRAPHS.values(), ids=GRAPHS)
def test_graphs_broken_inside_a_folder(tmp_path: Path, spoil: Callable[..., Any], reason: str, verb: str) -> None:
    folder = export(broken_files.write(tmp_path), config=broken_files.CONFIG).save(tmp_path / "graph")
    model = onnx.load(folder / MODEL, load_external_data=False)
    spoil(model)
    (folder / MODEL).write_bytes(model.SerializeToString())
    before = sorted(tmp_path.rglob("*"))
    assert reason in refused(verb, str(folder), "-o", str(tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_graph_unspoiled_is_optimized(tmp_path: Path) -> None:
    folder = export(broken_files.write(tmp_path), config=broken_files.CONFIG).save(tmp_path / "graph")
    result = CliRunner().invoke(cli.app, ["optimize", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and (tmp_path / "out" / MODEL).is_file()
