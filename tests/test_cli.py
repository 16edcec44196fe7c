"""The command line: what it prints, where, and with which exit code. Engines are stand-ins over the toy backend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import llmlab
from llmlab import cli
from llmlab.cli import answers, speed
from llmlab.errors import EngineError, InputError
from llmlab.graph.graph import Graph
from llmlab.speed import _once

sys.path.insert(0, str(Path(__file__).parent / "runtime"))
from toy_engine import ToyEngine, ToyManifest, greedy, vocab_size, write_tokenizer

from llmlab.text.tokenizer import Tokenizer

runner = CliRunner()
LLMLAB = [sys.executable, "-m", "llmlab"]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyEngine:
    """What the path "toy" opens as, while the test runs."""
    write_tokenizer(tmp_path / "engine")
    engine = ToyEngine(tmp_path / "engine", ToyManifest(max_seq_len=96, eos_token_ids=()))

    def load(path: str | Path) -> ToyEngine:
        if str(path) != "toy":
            raise EngineError(f"{path} is no engine")
        return engine

    monkeypatch.setitem(sys.modules, "llmlab.runtime.engine", SimpleNamespace(Engine=SimpleNamespace(load=load)))
    return engine


def expected(engine: ToyEngine, prompt: str, count: int) -> str:
    tokenizer = Tokenizer(engine.path)
    return answers.printable(tokenizer.decode(greedy(tokenizer.encode(prompt), count, eos=None)))


# run


def test_run_streams_the_answer_and_keeps_notes_apart(engine: ToyEngine) -> None:
    result = runner.invoke(cli.app, ["run", "toy", "the cat", "--max-tokens", "6"])
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == expected(engine, "<user>the cat<assistant>", 6).rstrip("\n")
    assert "6 out" in result.stderr and "length" in result.stderr
    raw = runner.invoke(cli.app, ["run", "toy", "the cat", "--max-tokens", "6", "--raw"])
    assert raw.stdout.rstrip("\n") == expected(engine, "the cat", 6).rstrip("\n") != result.stdout.rstrip("\n")


def test_run_answers_several_prompts_in_order_and_together(engine: ToyEngine) -> None:
    result = runner.invoke(cli.app, ["run", "toy", "the cat", "count", "x", "--raw", "--max-tokens", "20"])
    parts = [f"[{i}/3] {expected(engine, p, 20)}\n" for i, p in enumerate(["the cat", "count", "x"], start=1)]
    assert result.stdout == "".join(parts)
    assert engine.made.steps < 40, "prompts were answered one after another"


def test_run_json_and_ids_and_standard_input(engine: ToyEngine) -> None:
    result = runner.invoke(cli.app, ["run", "toy", "1,2,3", "4 5", "--ids", "--max-tokens", "4", "--json"])
    data = json.loads(result.stdout)
    assert [r["prompt_token_ids"] for r in data] == [[1, 2, 3], [4, 5]]
    assert data[0]["completions"][0]["token_ids"] == greedy([1, 2, 3], 4, eos=None)
    assert data[0]["metrics"]["output_tokens"] == 4
    piped = runner.invoke(cli.app, ["run", "toy", "-", "--raw", "--json", "--max-tokens", "2"], input="the cat")
    assert json.loads(piped.stdout)[0]["prompt"] == "the cat"


def test_run_without_a_tokenizer_prints_ids(engine: ToyEngine) -> None:
    (engine.path / "tokenizer.json").unlink()
    result = runner.invoke(cli.app, ["run", "toy", "1,2", "--ids", "--max-tokens", "3"])
    assert result.stdout.split() == [str(i) for i in greedy([1, 2], 3, eos=None)]
    refused = runner.invoke(cli.app, ["run", "toy", "hello"])
    assert refused.exit_code == 2 and "no tokenizer" in refused.stderr and refused.stdout == ""


def test_sampling_options_reach_the_engine(engine: ToyEngine) -> None:
    arguments = ["run", "toy", "the cat", "--json", "--max-tokens", "8", "--temperature", "2", "--seed"]
    first, again, other = (runner.invoke(cli.app, [*arguments, seed]).stdout for seed in ("1", "1", "2"))
    ids = [json.loads(text)[0]["completions"][0]["token_ids"] for text in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_model_output_cannot_steer_the_terminal() -> None:
    assert answers.printable("a\x1b[2Jb\x07\x9bc\td\n\r") == "a�[2Jb��c\td\n�"


# Errors and exit codes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "toy", ""], "empty|content"),
        (["run", "toy", "x", "--ids"], "expected integers"),
        (["run", "toy", "x", "--temperature", "-1"], "temperature"),
        (["run", "toy", "x " * 300, "--raw"], "at most 95"),
        (["run", "elsewhere", "x"], "elsewhere is no engine"),
        (["chat", "elsewhere"], "elsewhere is no engine"),
        (["bench", "toy", "--batch", "1,x"], "'1,x'"),
        (["bench"], "give an engine folder or a --shape"),
        (["bench", "toy", "--shape", "tiny"], "one of the two"),
        (["bench", "toy", "--prompt-len", "90", "--output-len", "90"], "this engine holds 96"),
        (["inspect", "/nowhere"], "/nowhere"),
        (["optimize", "/nowhere", "-o", "out"], "/nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(engine: ToyEngine, arguments: list[str], reason: str) -> None:
    result = runner.invoke(cli.app, arguments)
    if arguments == ["run", "toy", ""]:
        assert result.exit_code == 0  # the chat template makes a prompt of it
        arguments = [*arguments, "--raw"]
        result = runner.invoke(cli.app, arguments)
        reason = "the prompt is empty"
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("llmlab: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    assert reason in result.stderr


def test_debug_shows_the_traceback(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_DEBUG", "1")
    result = runner.invoke(cli.app, ["run", "elsewhere", "x"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "llmlab: elsewhere is no engine" in result.stderr


def test_a_file_system_error_is_one_line(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(answers, "read_prompts", refuse)
    result = runner.invoke(cli.app, ["run", "toy", "x"])
    assert result.exit_code == 2 and "Permission denied: '/secret'" in result.stderr


def test_ctrl_c_is_exit_code_130(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "answer", interrupt)
    result = runner.invoke(cli.app, ["run", "toy", "x"])
    assert result.exit_code == 130 and "Traceback" not in result.output


def test_ctrl_c_inside_the_exporters_native_code_is_exit_code_130(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise RuntimeError('failed to unpack with error "KeyboardInterrupt: <EMPTY MESSAGE>"')
        except RuntimeError as problem:
            raise EngineError("can't export") from problem

    monkeypatch.setattr(answers, "answer", fail)
    assert runner.invoke(cli.app, ["run", "toy", "x"]).exit_code == 130


# chat


def test_chat_remembers_resets_and_tells_its_speed(engine: ToyEngine) -> None:
    lines = "count\n/stats\nx\n/reset\ncount\n/nonsense\n\n/quit\nnever read\n"
    result = runner.invoke(cli.app, ["chat", "toy", "--system", "s", "--max-tokens", "4"], input=lines)
    assert result.exit_code == 0, result.output
    prompt = "<system>s<user>count<assistant>"
    first = expected(engine, prompt, 4)
    tokenizer = Tokenizer(engine.path)
    plain = tokenizer.decode(greedy(tokenizer.encode(prompt), 4, eos=None))
    second = expected(engine, f"<system>s<user>count<assistant>{plain}<user>x<assistant>", 4)
    assert second in result.stdout
    assert result.stdout.count(first) == 2, "after /reset the first question has its first answer again"
    assert "tokens/s" in result.stdout and "prefix cache" in result.stdout
    assert "There is no command /nonsense." in result.stdout and "/reset" in result.stdout


def test_chat_ends_with_the_input(engine: ToyEngine) -> None:
    assert runner.invoke(cli.app, ["chat", "toy"], input="").exit_code == 0


def test_chat_forgets_the_oldest_exchanges_when_there_is_no_room(engine: ToyEngine) -> None:
    lines = "".join(f"the cat sat on the mat {i}\n" for i in range(8))
    result = runner.invoke(cli.app, ["chat", "toy", "--max-tokens", "8"], input=lines)
    assert result.exit_code == 0 and "forgotten" in result.stdout and "at most" not in result.stdout
    result = runner.invoke(cli.app, ["chat", "toy"], input="x" * 200 + "\nx\n/stats\n")
    assert result.exit_code == 0 and "at most 95" in result.stdout, (
        "a question that can't fit is told, and life goes on"
    )
    assert "tokens/s" in result.stdout


def test_chat_needs_a_template(engine: ToyEngine) -> None:
    (engine.path / "chat_template.jinja").unlink()
    result = runner.invoke(cli.app, ["chat", "toy"], input="x\n")
    assert result.exit_code == 2 and "no chat template" in result.stderr


def test_ctrl_c_stops_the_answer_only(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from toy import ToyBackend

    execute, interrupted = ToyBackend.execute, []

    def once(self, batch):
        if self.steps == 5 and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return execute(self, batch)

    monkeypatch.setattr(ToyBackend, "execute", once)
    result = runner.invoke(cli.app, ["chat", "toy", "--max-tokens", "20"], input="count\n/stats\n")
    assert result.exit_code == 0 and interrupted
    assert "(stopped)" in result.stdout and "tokens/s" in result.stdout


# bench


def test_bench_measures(engine: ToyEngine) -> None:
    arguments = ["bench", "toy", "--batch", "1,4", "--prompt-len", "8", "--output-len", "6", "--repeat", "1", "--json"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0 and 0 <= row["outside_backend_share"] < 1
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["decode_step_ms"] * 1e3)
    table = runner.invoke(cli.app, arguments[:-1])
    assert all(word in table.stdout for word in ("prefill", "first", "decode")) and table.stdout.count(" ms ") == 4


def test_bench_counts_what_it_says(engine: ToyEngine) -> None:
    """Known step times: 20 ms a decode step and 10 ms more a prompt token, whatever the batch."""
    from llmlab.runtime.llm import LLM

    llm = LLM(engine, max_num_seqs=4)
    execute = engine.made.execute

    def timed(batch):
        prompt_tokens = len(batch.input_ids) - len(batch.kv_len)
        time.sleep(0.02 + 0.01 * max(prompt_tokens, 0))
        return execute(batch)

    engine.made.execute = timed  # type: ignore[method-assign]
    prefill, step, outside, whole = _once(llm.core, 2, 5, 4, np.random.default_rng(0))
    assert prefill == pytest.approx(10 / (0.02 + 0.01 * 8), rel=0.25)
    assert step == pytest.approx(0.02, rel=0.25) and 0 <= outside < 0.2
    assert whole == pytest.approx(0.02 + 0.01 * 8 + 3 * 0.02, rel=0.25)


@pytest.mark.parametrize("bad", ["", "0", "1,-2", "a", "1,,2"])
def test_bad_batch_sizes(bad: str) -> None:
    with pytest.raises(InputError, match="positive integers"):
        speed.batch_sizes(bad)


# The whole road, with a real checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocab_size(), eos_token_id=0, bos_token_id=None, **sizes, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that the command line built in three steps."""
    folder = tmp_path_factory.mktemp("road")
    for arguments in (
        ["export", str(checkpoint), "-o", str(folder / "plain")],
        ["optimize", str(folder / "plain"), "-o", str(folder / "serving")],
        ["build", str(folder / "serving"), "-o", str(folder / "engine")],
    ):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 0 and result.stderr == "", result.output
    return folder


def test_an_engine_answers_as_transformers_does(built: Path, checkpoint: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    engine = str(built / "engine")
    result = runner.invoke(cli.app, ["run", engine, "the cat sat", "count", "--raw", "--json", "--max-tokens", "16"])
    assert result.exit_code == 0, result.output
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    for answer in json.loads(result.stdout):
        ids = torch.tensor([answer["prompt_token_ids"]])
        whole = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, attention_mask=ids * 0 + 1)
        assert answer["completions"][0]["token_ids"] == whole[0, ids.shape[1] :].tolist()


def test_build_does_all_three_steps_in_one_go(
    built: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(source: str, **options: Any) -> Graph:  # exporting again would take most of the time
        assert source == str(checkpoint) and {k: v for k, v in options.items() if v} == {"max_seq_len": 64}
        return Graph.load(built / "plain")

    monkeypatch.setattr(llmlab, "export", exported)
    result = runner.invoke(cli.app, ["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--max-seq-len", "64"])
    assert result.exit_code == 0 and "llama, 2 layers" in result.stdout, result.output
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert manifest["limits"]["max_seq_len"] == 64
    same = (tmp_path / "engine" / "weights.bin").read_bytes() == (built / "engine" / "weights.bin").read_bytes()
    assert same, "one go and three steps give the same weights"


def test_inspect_shows_what_is_there(built: Path, checkpoint: Path) -> None:
    for path, kind, shown in (
        (checkpoint, "checkpoint", "lm_head.weight"),
        (built / "plain", "graph", "plain graph of a llama model"),
        (built / "serving", "graph", "PagedAttention"),
        (built / "engine", "engine", "weights.bin"),
    ):
        table = runner.invoke(cli.app, ["inspect", str(path)])
        assert table.exit_code == 0 and shown in table.stdout, table.output
        data = json.loads(runner.invoke(cli.app, ["inspect", str(path), "--json"]).stdout)
        assert data["kind"] == kind and data["path"] == str(path)
    assert "merge_products" in runner.invoke(cli.app, ["inspect", str(built / "serving")]).stdout


def test_a_graph_may_refer_to_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    plain, serving, trust = str(tmp_path / "plain"), str(tmp_path / "serving"), ["--weights-from", str(checkpoint)]
    assert runner.invoke(cli.app, ["export", str(checkpoint), "-o", plain, "--no-copy-weights"]).exit_code == 0
    refused = runner.invoke(cli.app, ["optimize", plain, "-o", serving])
    assert refused.exit_code == 2 and "--weights-from" in refused.stderr and not Path(serving).exists()
    assert runner.invoke(cli.app, ["optimize", plain, "-o", serving, *trust]).exit_code == 0
    assert runner.invoke(cli.app, ["inspect", plain, "--diff", serving, *trust]).exit_code == 0


def test_a_target_that_is_not_there_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmlab, "export", lambda *_, **__: pytest.fail("the target should have been looked at first"))
    result = runner.invoke(cli.app, ["build", "tinychat", "-o", str(tmp_path / "e"), "--target", "abacus"])
    assert result.exit_code == 2 and "'abacus'; available: onnxruntime" in result.stderr


def test_bench_builds_a_model_in_the_sizes_of_a_known_one() -> None:
    arguments = ["bench", "--shape", "tiny", "--batch", "2", "--prompt-len", "8", "--output-len", "4", "--repeat", "1"]
    result = runner.invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    [row] = found["rows"]
    assert found["engine"] == "tiny on onnxruntime" and row["batch"] == 2
    assert min(row["tokens_per_s"], row["decode_tokens_per_s"], row["first_token_ms"]) > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shape", "llama-9"], "no shape 'llama-9', expected one of: tiny,"),
        (["--shape", "tiny", "--target", "abacus"], "'abacus'; available"),
        (["--shape", "tiny", "--prompt-len", "4000", "--output-len", "97"], "tiny takes 4096"),
    ],
)
def test_a_shape_that_cant_be_measured_is_refused(arguments: list[str], reason: str) -> None:
    result = runner.invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 2 and reason in result.stderr


def test_chat_and_bench_run_on_a_real_engine(built: Path) -> None:
    engine = str(built / "engine")
    chat = runner.invoke(cli.app, ["chat", engine, "--max-tokens", "8"], input="count to nine\nthe cat\n/stats\n")
    assert chat.exit_code == 0, chat.output
    cached = int(chat.stdout.split(" prompt tokens came from the prefix cache")[0].split()[-1])
    assert cached > 10, "the second turn computes the first one again"
    arguments = ["bench", engine, "--batch", "2", "--prompt-len", "16", "--output-len", "8", "--repeat", "1"]
    assert "prefill" in runner.invoke(cli.app, arguments).stdout


def test_an_output_that_exists_is_kept(built: Path, checkpoint: Path) -> None:
    before = (built / "engine" / "manifest.json").read_bytes()
    refused = runner.invoke(cli.app, ["build", str(checkpoint), "-o", str(built / "engine")])
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert (built / "engine" / "manifest.json").read_bytes() == before
    assert runner.invoke(cli.app, ["build", str(built / "engine"), "-o", "x"]).exit_code == 2, "an engine is no source"
    forced = runner.invoke(cli.app, ["build", str(built / "serving"), "-o", str(built / "engine"), "--force"])
    assert forced.exit_code == 0


def test_ctrl_c_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path) -> None:
    command = [*LLMLAB, "build", str(checkpoint), "-o", str(tmp_path / "out" / "engine")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# As a program


def test_help_is_quick_and_needs_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['llmlab', '--help']\n"
        "import llmlab.cli\n"
        "try: llmlab.cli.main()\n"
        "except SystemExit as end: print(end.code, {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stderr
    for verb in ("export", "optimize", "build", "run", "chat", "bench", "inspect"):
        assert f" {verb} " in done.stdout
        assert "Example" in runner.invoke(cli.app, [verb, "--help"]).stdout


def test_exit_codes_of_the_program(tmp_path: Path) -> None:
    missing = subprocess.run([*LLMLAB, "inspect", str(tmp_path / "no")], capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and missing.stdout == ""
    usage = subprocess.run([*LLMLAB, "bogus"], capture_output=True, text=True)
    assert usage.returncode == 2 and "bogus" in usage.stderr
    version = subprocess.run([*LLMLAB, "--version"], capture_output=True, text=True)
    assert version.returncode == 0 and version.stdout.count(".") == 2


# Looking into a graph


def test_inspect_why(built: Path) -> None:
    serving = str(built / "serving")
    shown = runner.invoke(cli.app, ["inspect", serving, "--why", "layers.0.self_attn"])
    assert shown.exit_code == 0 and "page_attention  fired 1×" in shown.stdout, shown.output
    assert "pattern not found here" in shown.stdout
    data = json.loads(runner.invoke(cli.app, ["inspect", serving, "--why", "layers.0.self_attn", "--json"]).stdout)
    assert data["place"] == "layers.0.self_attn" and {"fired", "not found"} <= {p["status"] for p in data["passes"]}


def test_inspect_diff(built: Path) -> None:
    plain, serving = str(built / "plain"), str(built / "serving")
    shown = runner.invoke(cli.app, ["inspect", plain, "--diff", serving])
    assert shown.exit_code == 0 and "/PagedAttention (llmlab::PagedAttention)" in shown.stdout, shown.output
    data = json.loads(runner.invoke(cli.app, ["inspect", plain, "--diff", serving, "--json"]).stdout)
    assert data["ops"]["llmlab::PagedAttention"] == 2
    assert "no difference" in runner.invoke(cli.app, ["inspect", plain, "--diff", plain]).stdout


def test_inspect_passes(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab import ablation

    def measure(graph: Graph, *, threads: int | None) -> object:
        assert graph.kind == "plain" and threads == 1
        yield ablation.Ablated("", "all passes", nodes=9), 2
        yield ablation.Ablated("fuse_rope", "required", "it is refused"), 2

    monkeypatch.setattr(ablation, "measure", measure)
    arguments = ["inspect", "--passes", str(built / "plain"), "--threads", "1"]
    shown = runner.invoke(cli.app, arguments)
    assert shown.exit_code == 0 and "fuse_rope: required: it is refused" in shown.stdout, shown.output
    data = json.loads(runner.invoke(cli.app, [*arguments, "--json"]).stdout)
    assert [row["name"] for row in data["rows"]] == ["", "fuse_rope"]

    def interrupted(graph: Graph, *, threads: int | None) -> object:
        yield ablation.Ablated("", "all passes"), 2
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "measure", interrupted)
    stopped = runner.invoke(cli.app, arguments)
    assert stopped.exit_code == 130 and stopped.stdout == "" and "Traceback" not in stopped.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give a checkpoint, a graph or an engine to look at"),
        (["--why", "mlp"], "give a checkpoint, a graph or an engine to look at"),
        (["serving", "--why", "mlp", "--diff", "plain"], "--why and --diff exclude each other"),
        (["serving", "--why", "mlp", "--passes"], "--why and --passes exclude each other"),
        (["serving", "--why", "layers.0.self_atn"], "nearest: "),
        (["serving", "--why", ""], "expected a part of a module's path"),
        (["nowhere", "--why", "mlp"], "nowhere holds no graph"),
        (["plain", "--diff", "nowhere"], "nowhere holds no graph"),
        (["plain", "--diff", "engine"], "is an engine already"),
        (["engine", "--why", "mlp"], "is an engine already"),
        (["serving", "--passes"], "serving graph already"),
    ],
)
def test_looking_at_what_is_not_there(built: Path, arguments: list[str], reason: str) -> None:
    given = [str(built / a) if a in ("serving", "plain", "engine", "nowhere") else a for a in arguments]
    result = runner.invoke(cli.app, ["inspect", *given])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("llmlab: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    assert reason in result.stderr
