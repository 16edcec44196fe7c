"""`llmlab chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llmlab.cli.answers import printable
from llmlab.errors import InputError, LlmlabError

if TYPE_CHECKING:
    from llmlab.runtime.llm import LLM
    from llmlab.runtime.outputs import RequestMetrics
    from llmlab.runtime.params import SamplingParams

HELP = """\
/reset   forget the conversation
/stats   speed of the last answer and of all
/help    this list
/quit    leave (so does Ctrl-D)
Ctrl-C   stop the answer that is being written"""


class Chat:
    """A conversation and the loop around it. Lines come from standard input, answers stream to standard output."""

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None = None) -> None:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise InputError("this engine has no chat template: use `llmlab run --raw`")
        self._llm = llm
        self._params = params
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []
        self._answers: list[RequestMetrics] = []

    def loop(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input())
        self._console.print("Ask away. /help lists the commands.", style="dim")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                self._console.print()
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._messages.clear()
            self._console.print("The conversation starts anew.", style="dim")
        elif line == "/stats":
            self._console.print(self._stats())
        else:
            if line != "/help":
                self._console.print(f"There is no command {line}.", style="yellow")
            self._console.print(HELP, style="dim")

    def _turn(self, line: str) -> None:
        question = {"role": "user", "content": line}
        try:
            self._make_room(question)
            stream = self._llm.stream([*self._system, *self._messages, question], self._params)
        except LlmlabError as error:
            self._console.print(str(error), style="red")
            return
        pieces: list[str] = []
        try:
            for delta in stream:
                pieces.append(delta.text)
                self._console.print(printable(delta.text), end="")
                self._console.file.flush()
            self._console.print()
        except KeyboardInterrupt:
            stream.close()
            self._console.print(" (stopped)", style="dim")
        except LlmlabError as error:
            self._console.print(f"\n{error}", style="red")
            return
        self._answers.append(stream.result.metrics)
        self._messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _make_room(self, question: dict[str, str]) -> None:
        """Forget the oldest exchanges until the prompt leaves room for an answer."""
        tokenizer, limit = self._llm.tokenizer, self._llm.core.backend.limits.max_seq_len
        assert tokenizer is not None  # __init__ refuses engines without one
        room, forgotten = min(self._params.max_tokens, limit // 4), 0
        while self._messages:
            _, ids = tokenizer.encode_chat([*self._system, *self._messages, question])
            if len(ids) + room <= limit:
                break
            del self._messages[:2]
            forgotten += 1
        if forgotten:
            self._console.print(f"(the oldest {forgotten} of the exchanges are forgotten: no more room)", style="dim")

    def _stats(self) -> Table:
        table = Table("", "prompt tokens", "answer tokens", "first token", "per token", "tokens/s")
        for name, metrics in (("last", self._answers[-1:]), ("all", self._answers)):
            if not metrics:
                continue
            gaps = [gap for m in metrics for gap in m.itl_s]
            out, seconds = sum(m.output_tokens for m in metrics), sum(m.e2e_s for m in metrics)
            table.add_row(
                name,
                str(sum(m.prompt_tokens for m in metrics)),
                str(out),
                f"{sum(m.ttft_s for m in metrics) / len(metrics) * 1e3:.0f} ms",
                f"{sum(gaps) / len(gaps) * 1e3:.1f} ms" if gaps else "",
                f"{out / seconds:.1f}" if seconds else "",
            )
        table.caption = f"{self._llm.core.stats.total.cached_tokens} prompt tokens came from the prefix cache"
        return table
