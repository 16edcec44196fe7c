"""One engine that answers, in a worker thread that can be stopped between two tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmlab.errors import InputError, LlmlabError
from llmlab.runtime.llm import LLM, LoadedEngine

if TYPE_CHECKING:
    from llmlab.runtime.outputs import Delta, RequestMetrics
    from llmlab.runtime.params import SamplingParams
    from llmlab.text.tokenizer import Tokenizer


class Speaker:
    """An LLM with a name.

    engine: an LLM, which stays its owner's, or an Engine or the path of one, which is opened here and closed by `close`
    Raises InputError where it can't chat: without a tokenizer or a chat template.
    """

    def __init__(self, engine: LLM | LoadedEngine | str | Path, name: str, *, threads: int | None = None) -> None:
        self.name = name
        self._own = not isinstance(engine, LLM)
        # Two places, so that an answer that was just stopped doesn't hold up the next; the turns before stay cached.
        self.llm = (
            engine if isinstance(engine, LLM) else LLM(engine, threads=threads, max_num_seqs=2, prefix_cache=True)
        )
        tokenizer = self.llm.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            self.close()
            raise InputError(f"{name} has no chat template, so it can't chat: use LLM.generate")
        self.tokenizer: Tokenizer = tokenizer

    def close(self) -> None:
        if self._own:
            self.llm.close()


class Generation:
    """One answer being generated. `on_piece` and `on_end` are called on its thread.

    on_piece(delta); on_end(finish_reason or None, error line or "", metrics or None)
    after: a generation to wait for first
    """

    def __init__(
        self,
        speaker: Speaker,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams,
        *,
        on_piece: Callable[[Delta], None],
        on_end: Callable[[str | None, str, RequestMetrics | None], None],
        after: Generation | None = None,
    ) -> None:
        self._speaker, self._messages, self._params = speaker, messages, params
        self._on_piece, self._on_end, self._after = on_piece, on_end, after
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"llmlab-chat-{speaker.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it before its next token; returns at once."""
        self._stopping.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it is over; whether it is."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        reason, error, metrics = None, "", None
        try:
            if self._after is not None:
                self._after.join()
            reason, metrics = self._generate()
        except LlmlabError as problem:
            error = str(problem)
        except Exception as problem:  # a bug of ours, which must not leave the panel waiting for ever
            error = f"the engine failed: {type(problem).__name__}: {problem}"
        self._on_end(reason, error, metrics)

    def _generate(self) -> tuple[str | None, RequestMetrics | None]:
        if self._stopping.is_set():
            return "cancelled", None
        stream = self._speaker.llm.stream(self._messages, self._params)
        try:
            for delta in stream:
                self._on_piece(delta)
                if delta.finish_reason is not None:
                    return delta.finish_reason, stream.result.metrics
                if self._stopping.is_set():
                    break
        finally:
            stream.close()
        return "cancelled", stream.result.metrics
