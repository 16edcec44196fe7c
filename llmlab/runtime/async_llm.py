"""AsyncLLM: many requests at once from asyncio code, over one engine in a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llmlab.errors import EngineError, InputError, LlmlabError
from llmlab.runtime.llm import LoadedEngine, open_engine
from llmlab.runtime.outputs import Delta, Result
from llmlab.runtime.session import Message, Params, Prompt, Session, split_conversations, split_prompts
from llmlab.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmlab.runtime.params import SamplingParams

_Item: TypeAlias = "Delta | LlmlabError"


@dataclass(frozen=True)
class _Mailbox:
    """Where a session's pieces go: a queue that belongs to an event loop."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[_Item]


class AsyncStream(AsyncIterator[Delta]):
    """The pieces of one answer. Cancelling the task that waits for one, or dropping the stream, cancels the request."""

    def __init__(self, session: Session, items: asyncio.Queue[_Item], cancel: Callable[[], None]) -> None:
        self._session = session
        self._items = items
        self._cancel = cancel
        self._unfinished = session.request.params.n

    async def __anext__(self) -> Delta:
        if not self._unfinished:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except BaseException:
            self.close()
            raise
        if isinstance(item, LlmlabError):
            self._unfinished = 0
            raise item
        self._unfinished -= item.finish_reason is not None
        return item

    def close(self) -> None:
        """Cancel the request if it goes on."""
        if self._unfinished:
            self._unfinished = 0
            self._cancel()

    def __del__(self) -> None:
        self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    @property
    def result(self) -> Result:
        """All that was generated so far, with its metrics; complete once the stream has ended."""
        return self._session.result()


class AsyncLLM:
    """Like LLM, for asyncio: servers, widgets, notebooks with a running loop. Arguments are those of LLM.

    A worker thread owns the engine and works on all requests together. Streams may be read from any number of tasks
    and event loops. Making one loads the engine and blocks while it does.
    """

    def __init__(
        self,
        engine: LoadedEngine | str | Path,
        *,
        threads: int | None = None,
        max_num_seqs: int | None = None,
        max_tokens_per_step: int | None = None,
        prefix_cache: bool = False,
        kv_blocks: int | None = None,
        kv_memory_fraction: float | None = None,
    ) -> None:
        self._backend, self._frontend = open_engine(
            engine,
            threads=threads,
            max_num_seqs=max_num_seqs,
            max_tokens_per_step=max_tokens_per_step,
            prefix_cache=prefix_cache,
            kv_blocks=kv_blocks,
            kv_memory_fraction=kv_memory_fraction,
        )
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._stopping = False
        self._drain = False
        self._worker = threading.Thread(target=self._work, name="llmlab-engine", daemon=True)
        self._worker.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the engine has none; it then takes token ids only."""
        return self._frontend.tokenizer

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> AsyncStream:
        """Answer one prompt (text, token ids or a conversation) piece by piece: `async for delta in llm.stream(...)`.

        Must be called where an event loop runs. Raises InputError; while streaming, EngineError if the engine fails.
        """
        return self._start([prompt], params, template_variables)[0]

    async def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Result | list[Result]:
        """Answer one prompt (a Result), or a list of prompts together (a list of Results). As LLM.generate."""
        items, single = split_prompts(prompts)
        results = await self._collect(self._start(items, params, None))
        return results[0] if single else results

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Result | list[Result]:
        """Answer one conversation, or a list of conversations together. As LLM.chat."""
        items, single = split_conversations(messages)
        results = await self._collect(self._start(items, params, template_variables))
        return results[0] if single else results

    async def aclose(self, *, drain: bool = False) -> None:
        """As close, without blocking the event loop."""
        await asyncio.to_thread(self.close, drain=drain)

    def close(self, *, drain: bool = False) -> None:
        """Stop taking requests, cancel those under way (drain=True: finish them), free the engine.

        Streams that are cut off raise EngineError.
        """
        with self._gate:
            if not self._closed:
                self._closed, self._drain = True, drain
                self._tasks.put(self._stop)
        self._worker.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def _start(
        self, prompts: Sequence[Prompt], params: Params, template_variables: Mapping[str, Any] | None
    ) -> list[AsyncStream]:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise InputError("AsyncLLM is for async code, and no event loop runs here: use LLM instead") from error
        sessions = self._frontend.prepare(prompts, params, template_variables=template_variables)
        streams = []
        for session in sessions:
            session.mailbox = _Mailbox(loop, asyncio.Queue())
            cancel = _bind(self._tasks.put, _bind(self._frontend.cancel, session))
            streams.append(AsyncStream(session, session.mailbox.items, cancel))
        with self._gate:
            if self._closed:
                for stream in streams:
                    stream._unfinished = 0
                raise EngineError("this AsyncLLM was closed: make a new one")
            self._tasks.put(lambda: self._frontend.submit(sessions))
        return streams

    async def _collect(self, streams: list[AsyncStream]) -> list[Result]:
        try:
            for stream in streams:
                async for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.close()
        return [stream.result for stream in streams]

    # The worker thread's side.

    def _work(self) -> None:
        try:
            while not (self._stopping and not self._frontend.has_work):
                try:
                    self._run_tasks(wait=not self._frontend.has_work and not self._stopping)
                    if self._frontend.has_work:
                        self._step()
                except Exception as error:  # a bug of ours: tell everyone who waits, and go on with an empty engine
                    self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
        finally:
            self._backend.close()

    def _run_tasks(self, *, wait: bool) -> None:
        while True:
            try:
                task = self._tasks.get(block=wait)
            except queue.Empty:
                return
            task()
            wait = False

    def _step(self) -> None:
        _deliver(
            [
                (session, delta if session.error is None else EngineError(session.error))
                for session, delta in self._frontend.step()
            ]
        )

    def _stop(self) -> None:
        self._stopping = True
        if not self._drain:
            self._fail_all("this AsyncLLM was closed")

    def _fail_all(self, reason: str) -> None:
        _deliver([(session, EngineError(reason)) for session in self._frontend.cancel_all(reason)])


def _bind(function: Callable[[Any], object], argument: Any) -> Callable[[], None]:
    def bound() -> None:
        function(argument)

    return bound


def _deliver(items: Sequence[tuple[Session, _Item]]) -> None:
    """Hand items over to their event loops, waking each loop once."""
    per_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[_Item], _Item]]] = defaultdict(list)
    for session, item in items:
        per_loop[session.mailbox.loop].append((session.mailbox.items, item))
    for loop, batch in per_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, batch)
        except RuntimeError:  # that loop was closed, with everything that waited in it
            continue


def _put_all(batch: Sequence[tuple[asyncio.Queue[_Item], _Item]]) -> None:
    for items, item in batch:
        items.put_nowait(item)
