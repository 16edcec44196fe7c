"""`python -m llmlab.demo`, which is `make demo`: the model that ships, from checkpoint to tokens, every step shown."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import llmlab as ll
from llmlab import zoo
from llmlab.config import ModelConfig
from llmlab.errors import EngineError, InputError, LlmlabError
from llmlab.files import read_json
from llmlab.runtime.manifest import MANIFEST

if TYPE_CHECKING:
    from llmlab.runtime.outputs import Result

ENGINE = Path("engines/tinychat")
PROMPTS = (
    "How do I count to nine in French?",
    "Spell the word engine backwards.",
    "Anna has 12 shells.\nBen has 31 coins.\nClara has 7 shells.\nHow many shells does Clara have?",
)
IN_FLIGHT = 32
_NEXT = (
    (f"{{llmlab}} chat {ENGINE}", "talk to it"),
    ("make lab", "step by step: notebooks/01_checkpoint_to_engine"),
    ("make test", "what proves all this"),
)


def main() -> int:
    """Run the demo in the current folder. Returns the exit code: 0, 2 after an error of ours, 130 after Ctrl-C."""
    console = Console(highlight=False, markup=True, soft_wrap=True)
    try:
        engine = _reuse(ENGINE)
        if engine is None:
            if (ENGINE / MANIFEST).is_file():
                console.print(f"{ENGINE} is not of this model and this llmlab: made again.")
            elif ENGINE.exists():
                raise InputError(f"{ENGINE} is there and no engine of llmlab: move it away, or run the demo elsewhere")
            engine = _make(console)
        else:
            console.print(f"{ENGINE} is there already, built from this model by this llmlab ({ll.__version__}).")
        with ll.LLM(engine) as llm:
            _report(console, engine, [_stream(console, llm, prompt) for prompt in PROMPTS], *_together(llm))
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped")
        return 130
    except LlmlabError as error:
        if os.environ.get("LLMLAB_DEBUG") == "1":
            raise
        print(f"llmlab: {error}", file=sys.stderr)
        return 2
    return 0


def _reuse(folder: Path) -> ll.Engine | None:
    """The engine in `folder` if it is whole, of this model and version, and newer than all of llmlab's files."""
    package = Path(ll.__file__).parent
    manifest = folder / MANIFEST
    try:
        engine = ll.Engine.load(folder)
        version = read_json(manifest, EngineError).get("llmlab")
    except LlmlabError:
        return None
    shipped = ModelConfig.from_hf(read_json(zoo.path() / "config.json", EngineError))
    newest = max(p.stat().st_mtime for p in (*package.rglob("*.py"), *zoo.path().iterdir()))
    current = version == ll.__version__ and engine.manifest.config == shipped and manifest.stat().st_mtime > newest
    return engine if current else None


def _make(console: Console) -> ll.Engine:
    """Export, optimize and build, a line each."""
    start = time.perf_counter()

    def done(name: str, text: str) -> None:
        nonlocal start
        now = time.perf_counter()
        console.print(f"[bold]{name:<9}[/] {text:<58} {now - start:6.1f} s")
        start = now

    with console.status("exporting: torch traces the model …") as status:
        plain = ll.export("tinychat", progress=False)
        done("export", f"the checkpoint → what torch writes, {len(plain.surgeon.nodes):,} nodes")
        status.update("optimizing: pass by pass …")
        graph = ll.optimize(plain)
        nodes = f"{len(plain.surgeon.nodes):,} → {len(graph.surgeon.nodes):,} nodes"
        done("optimize", f"{len(graph.history)} passes, {nodes}, {len(graph.kv_layers())} paged attentions")
        status.update("building: lowering to ONNX Runtime …")
        engine = ll.build(graph, ENGINE, overwrite=True)
        done("build", f"→ {ENGINE}, {engine.size / 1e6:.1f} MB, for {engine.manifest.target}")
    return engine


def _stream(console: Console, llm: ll.LLM, prompt: str) -> Result:
    """Ask, and print the answer as it comes."""
    shown = prompt.replace("\n", "\n  ")
    console.print(f"\n[bold cyan]>[/] [bold]{shown}[/]")
    stream = llm.stream([{"role": "user", "content": prompt}])
    for delta in stream:
        console.print(delta.text, end="", markup=False)
        console.file.flush()
    console.print()
    return stream.result


def _together(llm: ll.LLM) -> tuple[int, float]:
    """Held-out prompts, all in flight at once: how many answers are right, and tokens per second of all together."""
    from llmlab.zoo.tasks import examples

    asked = examples("held-out", IN_FLIGHT)
    start = time.perf_counter()
    results = llm.chat([example.messages for example in asked], progress=False)
    seconds = time.perf_counter() - start
    assert isinstance(results, list)  # as conversations are many
    right = sum(result.text == example.answer for result, example in zip(results, asked, strict=True))
    return right, sum(result.metrics.output_tokens for result in results) / seconds


def _report(console: Console, engine: ll.Engine, results: Sequence[Result], right: int, together: float) -> None:
    gaps = [gap for result in results for gap in result.metrics.itl_s]
    first = min(result.metrics.ttft_s for result in results)
    table = Table(show_header=False, title="What you have now", title_justify="left", title_style="bold")
    table.add_row("engine", f"{engine.path}, {engine.size / 1e6:.1f} MB")
    table.add_row("runs on", f"{engine.manifest.target}, {engine.manifest.precision}")
    table.add_row("time to first token", f"{first * 1e3:.1f} ms")
    table.add_row("time per step", f"{sum(gaps) / len(gaps) * 1e3:.2f} ms, one prompt at a time")
    table.add_row("speed", f"{len(gaps) / sum(gaps):,.0f} tokens/s, one prompt at a time")
    table.add_row("", f"{together:,.0f} tokens/s, {IN_FLIGHT} prompts in flight together")
    table.add_row("right answers", f"{right} of those {IN_FLIGHT}, none of which it was trained on")
    console.print()
    console.print(table)
    console.print("\n[bold]Next[/]")
    commands = [what.format(llmlab=_command()) for what, _ in _NEXT]
    for command, (_, why) in zip(commands, _NEXT, strict=True):
        console.print(f"  {command:<{max(map(len, commands))}}  {why}")


def _command() -> str:
    """How the shell finds `llmlab`: by name, or in the virtual environment of this folder, where that isn't active."""
    beside = Path(sys.executable).with_name("llmlab")
    if shutil.which("llmlab") or not beside.is_relative_to(Path.cwd()):
        return "llmlab"
    return str(beside.relative_to(Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
